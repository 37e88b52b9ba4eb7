//! The CPU backend: packed weight layouts, SIMD kernels, the worker pool and one implementation of
//! every block. Knows no file, no model architecture and no other backend.

pub mod isa;

pub use isa::Isa;
