"""What the model is made of beyond MindFormers: router, dispatch of tokens to experts, operators by device."""
