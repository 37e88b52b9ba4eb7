//! Slots of routed experts that change between steps ([`ExpertSlots`]): an expert that the CPU has in packed panels
//! takes the place of one that the GPU holds. Who goes and who comes is not decided here.
//!
//! The table of a mixture is the one truth of what the GPU holds: kernels find experts through it, and what is handed
//! to the CPU names those that are in it. It changes on the stream of the steps, so each step sees one state of it: the
//! old expert's entry is cleared before its slot is overwritten by a stream of copies, the new one's is written in a
//! later turn, when the copy is known to be complete.

use crate::arena::{Arena, Pinned, Ptr, Range};
use crate::compile::{Args, Function, Kernels, Launch, Program};
use crate::device::Device;
use crate::error::{During, Error};
use crate::layout::{self, ExpertSlot};
use crate::ops::DeviceWeight;
use crate::stream::{self, Chunk, Event, Pins, Queue};
use cudarc::driver::result;
use std::sync::Arc;
use tandem_spec::{Linear, Moe, Panels, TensorType, Weight};

/// Entries that one launch sets: as in experts.cu.
const N_ENTRIES: usize = 32;

#[repr(C)]
#[derive(Clone, Copy)]
struct SetArgs {
    at: [u64; N_ENTRIES],
    value: [u64; N_ENTRIES],
    n: u64,
}
// SAFETY: mirrors SetArgs in experts.cu, which compares sizes.
unsafe impl Args for SetArgs {}

/// What sets entries of tables.
pub fn program() -> Program {
    Program::new("experts.cu", include_str!("experts.cu")).args::<SetArgs>("SET_ARGS")
}

/// A mixture whose slots may change.
pub struct HostExperts {
    /// Index of the block among the backend's.
    pub block: usize,
    /// Of all its experts: the gates, then the ups, then the downs.
    pub panels: Vec<Panels>,
}

/// An expert that takes the place of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Index of the block among the backend's.
    pub block: usize,
    /// Which slot.
    pub slot: usize,
    /// Who is there.
    pub old: usize,
    /// Who comes.
    pub new: usize,
}

/// Bytes of device memory through which the experts of `block` come where they change: a packed matrix.
pub fn staging_bytes<W>(block: &Moe<W>, ty: impl Fn(&W) -> TensorType) -> usize {
    let (n_embd, n_ff) = (block.shape.n_embd, block.shape.n_ff);
    let packed = |(l, (n_rows, n_cols)): (&Linear<W>, (usize, usize))| {
        layout::bytes(n_rows.next_multiple_of(stream::PANEL_ROWS_MAX), n_cols, ty(&l.weight)).min(stream::CHUNK_BYTES)
    };
    let sizes = [(n_ff, n_embd), (n_ff, n_embd), (n_embd, n_ff)];
    block.stacks().into_iter().zip(sizes).map(packed).max().expect("three matrices")
}

/// Bytes of a slot for an expert of `block`.
pub fn slot_bytes(block: &Moe<Weight>) -> usize {
    ExpertSlot::new(block, |w| w.ty).bytes
}

/// Bytes of pinned memory for the uses of the experts of `block`.
pub fn count_bytes<W>(block: &Moe<W>) -> usize {
    4 * block.shape.n_experts
}

struct Mixture {
    block: usize,
    n_experts: usize,
    /// Of its numbers among all counts.
    first_count: usize,
    /// Whether its counts were asked for since they were read.
    is_counted: bool,
    table: Ptr,
    /// Address of slot 0.
    slots: Ptr,
    slot: ExpertSlot,
    panels: Vec<Panels>,
}

/// Slots of the mixtures of a backend that change.
pub(crate) struct ExpertSlots {
    /// Entries to set when the copies under way are complete: addresses and values.
    arriving: Vec<(u64, u64)>,
    /// What the stream of the steps has done before copies begin, and the last of them.
    begun: Event,
    arrived: Event,
    copies: Queue,
    set: Function,
    /// How often each expert of each mixture was chosen in the last batch that was streamed, i32, and when this is
    /// there.
    counts: Pinned,
    counted: Event,
    staging: Arena,
    /// Dropped before the panels that they pin.
    _pins: Pins,
    mixtures: Vec<Mixture>,
    device: Arc<Device>,
}

// SAFETY: driver handles may be used from any thread whose context is current; `mixtures` keeps the panels.
unsafe impl Send for ExpertSlots {}

impl ExpertSlots {
    /// For `experts` of the `blocks` of a backend, given with their tables. `planned` is for an out-of-memory message.
    ///
    /// # Errors
    /// No memory, or what compiler and driver say.
    pub fn new(
        device: &Arc<Device>,
        kernels: &Kernels,
        blocks: &[(&Moe<DeviceWeight>, Ptr)],
        experts: Vec<HostExperts>,
        staging_bytes: usize,
        planned: usize,
    ) -> Result<Self, Error> {
        let panels = || experts.iter().flat_map(|e| &e.panels);
        kernels.prepare(stream::unpackers(panels()).into_iter().chain([program()]))?;
        let pins = Pins::of(device, panels());
        let mut n_counts = 0;
        let mixture = |(HostExperts { block, panels }, (moe, table)): (HostExperts, &(&Moe<DeviceWeight>, Ptr))| {
            let n_experts = moe.shape.n_experts;
            assert_eq!(panels.len(), 3 * n_experts, "the host has every expert");
            // Experts lie in their slots one after the other, gate first.
            let slots = moe.ffn_gate_exps.weight.ptr;
            let (slot, first_count) = (ExpertSlot::new(moe, |w| w.ty), n_counts);
            n_counts += n_experts;
            Mixture { block, n_experts, first_count, is_counted: false, table: *table, slots, slot, panels }
        };
        let count_bytes = blocks.iter().map(|(moe, _)| count_bytes(moe)).sum();
        Ok(Self {
            mixtures: experts.into_iter().zip(blocks).map(mixture).collect(),
            arriving: Vec::new(),
            begun: Event::new()?,
            arrived: Event::new()?,
            copies: Queue::new(0)?,
            set: kernels.function(&program(), "set_entries", 0)?,
            counts: Pinned::new(count_bytes)?,
            counted: Event::new()?,
            staging: Arena::new(device, "experts on their way", staging_bytes, planned)?,
            _pins: pins,
            device: device.clone(),
        })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.staging.bytes()
    }

    /// Bytes of pinned memory.
    pub fn pinned_bytes(&self) -> usize {
        self.counts.bytes()
    }

    /// Queues a copy of how often each expert of block `block` was chosen: `counts` `[n_experts]` i32.
    ///
    /// # Errors
    /// What the driver says.
    pub fn count(&mut self, block: usize, counts: Ptr) -> Result<(), Error> {
        let Some(mixture) = self.mixtures.iter_mut().find(|m| m.block == block) else { return Ok(()) };
        mixture.is_counted = true;
        // SAFETY: all counts of the mixture are within the pinned memory, which outlives the stream's work.
        unsafe {
            let at = self.counts.as_ptr::<u32>().add(mixture.first_count);
            let bytes = std::slice::from_raw_parts_mut(at.cast::<u8>(), 4 * mixture.n_experts);
            result::memcpy_dtoh_async(bytes, counts.0, self.device.stream()).during("copying counts of experts")?;
        }
        self.counted.record(self.device.stream())
    }

    /// Calls `f` with the blocks of which counts were asked for since the last call, and these, when the batch is done.
    ///
    /// # Errors
    /// What the driver says.
    pub fn read_counts(&mut self, f: &mut dyn FnMut(usize, &[u32])) -> Result<(), Error> {
        if !self.mixtures.iter().any(|m| m.is_counted) {
            return Ok(());
        }
        // The next batch would wait for this one anyway, to write its tokens.
        self.counted.wait()?;
        for mixture in self.mixtures.iter_mut().filter(|m| m.is_counted) {
            mixture.is_counted = false;
            // SAFETY: as above; the copies are complete.
            f(mixture.block, unsafe {
                std::slice::from_raw_parts(self.counts.as_ptr::<u32>().add(mixture.first_count), mixture.n_experts)
            });
        }
        Ok(())
    }

    /// Makes the experts that have arrived known to the steps that are queued from now on. False while some are still
    /// on their way: then nothing can be exchanged.
    ///
    /// # Errors
    /// What the driver says.
    pub fn settle(&mut self) -> Result<bool, Error> {
        if self.arriving.is_empty() {
            return Ok(true);
        }
        self.device.bind()?;
        if !self.arrived.is_past()? {
            return Ok(false);
        }
        let arrived = std::mem::take(&mut self.arriving);
        self.set(&arrived)?;
        Ok(true)
    }

    /// After [`ExpertSlots::settle`]: begins `exchanges` when the steps that are queued are done. The slots are
    /// nobody's until they are complete.
    ///
    /// # Errors
    /// What the driver says.
    pub fn exchange(&mut self, exchanges: &[Exchange], kernels: &Kernels) -> Result<(), Error> {
        assert!(self.arriving.is_empty(), "one exchange at a time");
        if exchanges.is_empty() {
            return Ok(());
        }
        self.device.bind()?;
        let (mut leaving, mut arriving, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
        for e in exchanges {
            let mixture = self.mixtures.iter().find(|m| m.block == e.block).expect("a block whose slots change");
            assert!(e.old < mixture.n_experts && e.new < mixture.n_experts, "{e:?} of {}", mixture.n_experts);
            let slot = mixture.slots.offset(e.slot * mixture.slot.bytes);
            let entry = |expert: usize| mixture.table.offset(8 * expert).0;
            leaving.push((entry(e.old), 0));
            arriving.push((entry(e.new), slot.0));
            for (i, part) in mixture.slot.parts.iter().enumerate() {
                let panels = &mixture.panels[i * mixture.n_experts + e.new];
                chunks.extend(stream::chunks(&[(panels, slot.offset(part.offset))], kernels)?);
            }
        }
        self.set(&leaving)?;
        self.begun.record(self.device.stream())?;
        self.begun.hold(self.copies.0)?;
        chunks.iter().try_for_each(|chunk| self.copy(chunk))?;
        self.arrived.record(self.copies.0)?;
        self.arriving = arriving;
        Ok(())
    }

    /// Queues a copy of panels, and their way into planes. One stream does both, so the next copy finds the staging
    /// memory free.
    fn copy(&self, chunk: &Chunk) -> Result<(), Error> {
        let staging = self.staging.ptr(Range { offset: 0, bytes: chunk.bytes });
        // SAFETY: the panels live as long as `self`, which drains the stream before it goes; the staging memory holds
        // the chunk, which `ptr` has compared; the slot is nobody's meanwhile.
        unsafe {
            let bytes = std::slice::from_raw_parts(chunk.host as *const u8, chunk.bytes);
            result::memcpy_htod_async(staging.0, bytes, self.copies.0).during("copying experts")?;
            chunk.function.launch_on(self.copies.0, chunk.launch, &chunk.args_from(staging))
        }
    }

    /// Queues new values of entries of tables on the stream of the steps.
    fn set(&self, entries: &[(u64, u64)]) -> Result<(), Error> {
        for entries in entries.chunks(N_ENTRIES) {
            let mut args = SetArgs { at: [0; N_ENTRIES], value: [0; N_ENTRIES], n: entries.len() as u64 };
            for (i, (at, value)) in entries.iter().enumerate() {
                (args.at[i], args.value[i]) = (*at, *value);
            }
            // SAFETY: the addresses are those of entries of tables.
            unsafe { self.set.launch(&self.device, Launch::new(1, N_ENTRIES), &args)? };
        }
        Ok(())
    }
}

impl Drop for ExpertSlots {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            let _ = self.device.wait("the last step");
            let _ = self.device.wait_for(self.copies.0, "the last copies");
        }
    }
}
