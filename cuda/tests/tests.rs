//! Tests of the CUDA backend. Those that need NVRTC or a GPU print why they are skipped.

mod blocks;
mod compile;
mod gpu;
mod prompt;
mod sample;
mod stream;
