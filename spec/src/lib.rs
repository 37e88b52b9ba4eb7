//! What tandem computes: tensor types, the parameters and weights of every block, batches, and a
//! slow exact reference (sums in f64) of every block. Nothing here knows a device, a file or a
//! model architecture; backends (`tandem-cpu`, `tandem-cuda`) and the runtime meet only here.
//!
//! Shapes are written outermost first: a projection `[n_out, n_in]` is row-major, one row per
//! output, quantisation blocks along `n_in`.

pub mod attention;
pub mod batch;
pub mod decode;
pub mod delta_net;
pub mod embed;
pub mod ffn;
pub mod head;
pub mod math;
pub mod memory;
pub mod model;
pub mod moe;
pub mod mtp;
pub mod panel;
pub mod reference;
pub mod sampler;
pub mod tensor;
pub mod tensor_type;
pub mod testing;

pub use attention::{Attention, AttentionShape, AttentionState, KvDtype, Rope, RopeScaling, RopeStyle};
pub use batch::{Batch, Sequence};
pub use delta_net::{DeltaForm, DeltaNet, DeltaNetShape, DeltaNetState, HeadOrder};
pub use embed::Embed;
pub use ffn::{Ffn, FfnShape};
pub use head::{Head, HeadShape};
pub use math::Matrix;
pub use memory::StateBytes;
pub use model::{Block, Model};
pub use moe::{Moe, MoeShape, SharedExpert};
pub use mtp::Mtp;
pub use panel::{PanelMemory, Panels};
pub use reference::{BlockReference, Reference, StepResult};
pub use sampler::SamplerOptions;
pub use tensor::{Linear, Tensor, TensorSource, Weight};
pub use tensor_type::TensorType;
