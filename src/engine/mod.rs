//! The engine: what a plan says, loaded. [`Engine`] is immutable once loaded; a [`Session`] is one mutable
//! timeline over it. It refuses plans that name a device it does not have and batches that do not fit.

mod experts;
mod session;
mod step;
mod trace;

pub use experts::ExpertUses;
pub use session::Session;
pub use step::{DeviceOptions, Engine, Snapshot, States};
pub use trace::{Activity, Span, StepTrace, handoff_cost};

/// What can go wrong while loading weights or running a step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The CPU backend failed.
    #[error(transparent)]
    Cpu(#[from] tandem_cpu::Error),
    /// The prompt and what it continues are longer than the context.
    #[error("the prompt has {tokens} tokens but the context holds {n_ctx}; shorten it or raise --ctx")]
    PromptTooLong {
        /// Tokens of the whole prefix.
        tokens: usize,
        /// Positions of a slot.
        n_ctx: usize,
    },
    /// A GPU failed, or is not there.
    #[error(transparent)]
    Cuda(#[from] tandem_cuda::Error),
    /// A batch that does not fit the plan or the vocabulary.
    #[error("{0}")]
    Batch(String),
    /// The caller asked to stop between two batches of a prompt.
    #[error("interrupted")]
    Interrupted,
}
