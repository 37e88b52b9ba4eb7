//! The CUDA backend: kernels compiled at run time for the GPU found, device arenas, the uploader,
//! graphs, and one implementation of every block. Knows no file, no model architecture and no
//! other backend.

pub mod arena;
pub mod compile;
pub mod device;
pub mod error;
pub mod layout;
pub mod upload;

pub use device::{Device, GpuInfo, probe};
pub use error::Error;
