//! What passes between another device and the CPU workers in a step that both take part in: the residual stream, the
//! experts that were chosen, and what a share adds. Owns none of the memory; the other side does.

use std::marker::PhantomData;
use std::ops::Range;

/// What the workers do between two hand-overs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Consecutive blocks; one, where it is a share.
    pub blocks: Range<usize>,
    /// Whether the block is a share: the residual stream is left alone, and what the share adds goes to the sum.
    pub is_share: bool,
}

/// Memory that both sides see, by turns: the workers from [`Handoff::wait`] to [`Handoff::post`].
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Residual stream `[n_tokens, n_embd]`.
    pub x: *mut f32,
    /// What a share adds `[n_tokens, n_embd]`.
    pub sum: *mut f32,
    /// Elements of each of the two.
    pub len: usize,
    /// Chosen experts `[n_tokens, n_used]`, with [`ELSEWHERE`] set where they are not for the CPU.
    pub ids: *const u32,
    /// Their weights `[n_tokens, n_used]`.
    pub weights: *const f32,
    /// Elements of each of the two.
    pub n_choices: usize,
}

/// Marks a chosen expert that another device computes.
pub const ELSEWHERE: u32 = 1 << 31;

/// The other side of the tasks of a step.
///
/// # Safety
/// [`Handoff::memory`] is the same for the whole step and valid until its end; between [`Handoff::wait`] and
/// [`Handoff::post`] nobody but the workers touches it.
pub unsafe trait Handoff: Sync {
    /// The shared memory.
    fn memory(&self) -> Memory;

    /// Whether the input of task number `task` is complete; until then workers may read weights ahead.
    fn is_ready(&self, _task: usize) -> bool {
        true
    }

    /// The expert number `i` of those that task number `task` will probably be about, the likeliest first, marked as
    /// [`Memory::ids`]; `None`: nothing is known of it. A hint: it may be wrong.
    fn foreseen(&self, _task: usize, _i: usize) -> Option<u32> {
        None
    }

    /// Says that the workers begin to read ahead for task number `task`; [`Handoff::wait`] ends that. Called by one
    /// worker.
    fn reads_ahead(&self, _task: usize) {}

    /// Waits until the input of task number `task` is complete; `false`: it will not be. Called by one worker.
    fn wait(&self, task: usize) -> bool;

    /// Says that the output of task number `task` is complete. Called by one worker.
    fn post(&self, task: usize);
}

/// Experts that were chosen elsewhere.
#[derive(Clone, Copy)]
pub(crate) struct Choices<'a> {
    memory: Memory,
    lifetime: PhantomData<&'a [u32]>,
}

// SAFETY: the workers only read, while the other side leaves the memory alone.
unsafe impl Sync for Choices<'_> {}

impl Choices<'_> {
    /// # Safety
    /// The memory is valid while this lives, and nobody writes it while it is read.
    pub unsafe fn new(memory: Memory) -> Self {
        Self { memory, lifetime: PhantomData }
    }

    /// Expert of choice `i`, if it is for the CPU.
    pub fn expert(&self, i: usize) -> Option<usize> {
        assert!(i < self.memory.n_choices);
        // SAFETY: in bounds; `new` made its caller promise the rest.
        let id = unsafe { *self.memory.ids.add(i) };
        (id & ELSEWHERE == 0).then_some(id as usize)
    }

    /// Weight of choice `i`.
    pub fn weight(&self, i: usize) -> f32 {
        assert!(i < self.memory.n_choices);
        // SAFETY: as above.
        unsafe { *self.memory.weights.add(i) }
    }
}
