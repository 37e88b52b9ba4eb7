//! The CUDA backend: kernels compiled at run time for the GPU found, device arenas, the uploader,
//! graphs, and one implementation of every block. Knows no file, no model architecture and no
//! other backend.

pub mod arena;
pub mod backend;
pub mod compile;
pub mod device;
pub mod error;
pub mod layout;
pub mod ops;
pub mod probe;
pub mod stream;
pub mod upload;

mod attention;
mod delta_net;
mod dense;
pub mod experts;
mod few;
mod ffn;
mod gemv;
pub mod handoff;
mod head;
mod moe;
mod prompt;

pub use backend::{
    Backend, Feed, HostTask, LoadTimes, PROMPT_FROM, Snapshot, State, WeightsLayout, for_each_weight, programs,
};
pub use compile::Compiler;
pub use device::{Device, GpuInfo, gpus};
pub use error::{Error, driver_calls};
pub use handoff::Mailbox;
pub use head::can_sample;
pub use ops::{Options, StateLayout};
pub use prompt::Products;
pub use stream::{HostShare, StreamLayout, Streamed, can_stream};
