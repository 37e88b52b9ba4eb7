//! tandem: GGUF language models on the whole machine.
//!
//! `file -> model -> plan -> weights -> step -> token`: [`gguf`] reads the file, [`model`] describes it as
//! blocks, [`plan`] places the blocks, [`engine`] loads the weights and runs steps, [`text`] turns text
//! into tokens and back, and `cli` is what a person types.

pub mod cli;
pub mod engine;
pub mod gguf;
pub mod machine;
pub mod model;
pub mod plan;
pub mod text;
