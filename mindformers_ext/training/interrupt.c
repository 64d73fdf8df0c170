// While MindSpore 2.9 compiles or runs a graph, its handler of Ctrl-C sends the process a SIGTERM, which ends it without a
// word and with a signal for an exit code. Python's own handlers run only when the graph has ended, which can take
// minutes; this one says "interrupted" and ends at once. It can go when MindSpore raises KeyboardInterrupt.
#include <signal.h>
#include <string.h>
#include <unistd.h>

static pid_t process;

static void handle(int number, siginfo_t* info, void* context) {
  static const char line[] = "interrupted\n";
  (void)context;
  if (getpid() == process && info->si_pid == process) {
    (void)!write(STDERR_FILENO, line, sizeof(line) - 1);
    _exit(130);
  }
  signal(number, SIG_DFL);  // somebody else's SIGTERM, or one of a forked child, does what it always does
  raise(number);
}

void end_when_interrupted(void) {
  struct sigaction action;
  process = getpid();
  memset(&action, 0, sizeof(action));
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGTERM, &action, NULL);
}
