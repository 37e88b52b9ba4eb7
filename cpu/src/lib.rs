//! The CPU backend: packed weight layouts, SIMD kernels, the worker pool and one implementation of
//! every block. Knows no file, no model architecture and no other backend.

pub mod activations;
pub mod isa;
pub mod matrix;

pub use activations::{ActivationBuffer, Activations, Forms};
pub use isa::Isa;
pub use matrix::{Matrix, OutRows};
