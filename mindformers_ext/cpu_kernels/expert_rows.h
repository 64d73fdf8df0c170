// The choices of a router as rows sorted by expert.
#pragma once

#include "kernel.h"

namespace cpu_kernels {

// Choice i = token * K + k. Rows are choices sorted by expert, in token order within one; choices of no expert (an id
// outside 0..L-1) come last.
struct ExpertRows {
  std::vector<int32_t> choice_of_row;  // (T*K,)
  std::vector<int32_t> row_of_choice;  // (T*K,)
  std::vector<int64_t> first_row;      // (L+1,): expert e has rows first_row[e] ... first_row[e + 1]
};

inline ExpertRows sort_by_expert(const std::vector<int32_t>& ids, int64_t experts) {
  const auto slot = [experts](int32_t id) { return id >= 0 && id < experts ? id : experts; };
  std::vector<int64_t> first(experts + 2, 0);
  for (const int32_t id : ids) ++first[slot(id) + 1];
  for (int64_t e = 0; e <= experts; ++e) first[e + 1] += first[e];
  ExpertRows rows{std::vector<int32_t>(ids.size()), std::vector<int32_t>(ids.size()),
                  std::vector<int64_t>(first.begin(), first.end() - 1)};
  for (size_t i = 0; i < ids.size(); ++i) {
    const int64_t row = first[slot(ids[i])]++;
    rows.choice_of_row[row] = static_cast<int32_t>(i);
    rows.row_of_choice[i] = static_cast<int32_t>(row);
  }
  return rows;
}

// Rows of one expert.
struct RowBlock {
  int64_t expert, begin, end;
};

// Calls block(begin, end) for rows [first, last) in equal blocks of at most `size`, in their order.
template <class Block>
void each_block(int64_t first, int64_t last, int64_t size, const Block& block) {
  const int64_t rows = last - first, parts = blocks_of(rows, size);
  for (int64_t i = 0; i < parts; ++i) block(first + rows * i / parts, first + rows * (i + 1) / parts);
}

// The rows of each expert in equal blocks of at most `size`, the longest first: what is done last should be short.
inline std::vector<RowBlock> row_blocks(const std::vector<int64_t>& first_row, int64_t size) {
  std::vector<RowBlock> blocks;
  for (size_t e = 0; e + 1 < first_row.size(); ++e) {
    each_block(first_row[e], first_row[e + 1], size, [&](int64_t begin, int64_t end) {
      blocks.push_back({static_cast<int64_t>(e), begin, end});
    });
  }
  std::stable_sort(blocks.begin(), blocks.end(), [](const RowBlock& a, const RowBlock& b) {
    return a.end - a.begin > b.end - b.begin;
  });
  return blocks;
}

}  // namespace cpu_kernels
