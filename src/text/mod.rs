//! Text: tokenizer, chat template, sampler, and streaming of complete UTF-8.
