"""Read rows from files or the Hub, tokenise them, and pack the token sequences into batches."""
