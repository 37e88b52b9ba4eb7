//! The one integration test binary. Each module says here in a sentence what it shows.

#[path = "suite"]
mod suite {
    /// GGUF files are read as an independent reader reads them, split sets as one, and quickly.
    mod files;
    /// Every architecture and layout of a file becomes the same blocks, with every tensor in its place.
    mod models;
}
