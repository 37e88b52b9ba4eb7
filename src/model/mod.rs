//! Architectures: from the metadata and tensors of a file to a list of blocks. One file each.
