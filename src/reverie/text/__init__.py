"""Text: the tokenizer, and what is done with a prompt before a text encoder sees it."""
