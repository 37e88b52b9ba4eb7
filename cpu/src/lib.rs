//! The CPU backend: packed weight layouts, SIMD kernels, the worker pool and one implementation of
//! every block. Knows no file, no model architecture and no other backend.

pub mod activations;
mod ahead;
mod attention;
pub mod backend;
mod delta_net;
mod embed;
mod ffn;
mod gemm;
pub mod handoff;
mod head;
pub mod isa;
pub mod matrix;
mod moe;
mod norm;
mod pool;
mod projection;
mod read;
mod simd;
pub mod state;
mod step;

pub use activations::{ActivationBuffer, Activations, Forms};
pub use ahead::MAX_BYTES as AHEAD_BYTES;
pub use backend::{Backend, Error, Options, for_each_weight};
pub use isa::Isa;
pub use matrix::{Matrix, OutRows, panel_rows};
pub use read::ReadTest;
pub use state::{Floats, Snapshot, State, StateSize};
