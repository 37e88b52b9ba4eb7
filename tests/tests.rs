//! The one integration test binary. Each module says here in a sentence what it shows.

#[global_allocator]
static ALLOCATOR: suite::allocations::Counting = suite::allocations::Counting;

#[path = "suite"]
mod suite {
    /// What a plan counts is what is allocated.
    mod account;
    /// How much a piece of work allocates.
    pub mod allocations;
    /// The binary answers on standard output and refuses every mistake with one line and the right exit code.
    mod cli;
    /// Crafted files, one for every way in which a file can lie, are refused with a clear error and bounded memory.
    mod corpus;
    /// GGUF files are read as an independent reader reads them, split sets as one, and quickly.
    mod files;
    /// Whole models give the logits of the independent oracle, in every arithmetic, chunking and batch.
    mod golden;
    /// The same on a GPU, and its decode graph.
    mod golden_cuda;
    /// The GPU of the tests, which those of the CUDA backend share.
    #[path = "../../cuda/tests/gpu.rs"]
    mod gpu;
    /// Models shared between a GPU and the CPU give the same as either alone.
    mod hybrid;
    /// Every architecture and layout of a file becomes the same blocks, with every tensor in its place.
    mod models;
    /// Mutations of good files are refused, or are safe to compute with.
    mod mutations;
    /// The CPU backend gives the golden logits with every instruction set, in any chunks and batches.
    mod parity;
    /// Plans are the printed ones, and hold what every plan must hold.
    mod plan;
    /// The bundled model tells a story, remembers it in the next turn, and only what is new is computed.
    mod story;
    /// The same model on a GPU: the CPU's text, the host's samplers, and copies of states.
    mod story_cuda;
    /// Text becomes the tokens that other implementations give and comes back unchanged; vocabularies and chat
    /// templates that are wrong or hostile are refused in bounded time and memory.
    mod text;
    /// Style that a machine can check: imports, owners of outside crates, dead files.
    mod tidy;
}
