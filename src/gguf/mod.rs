//! GGUF files: header, metadata, tensor table, split sets and the mapped bytes.
