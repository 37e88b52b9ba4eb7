//! Feed-forward weights that stay in main memory and come to the GPU for large batches: the CPU's packed panels are
//! copied as they are, sorted into planes (`stream.cu`) on the device, and computed with while the next ones arrive.
//! Every byte crosses the bus once, and nothing waits on the host. [`StreamLayout`] is the pure side (sizes for the
//! planner).
//!
//! Weights that are computed with together are a unit: the matrices of an FFN, or some experts of a mixture. Three
//! streams work at the same time: one copies panels into a ring of chunks, one sorts chunks into the planes of a
//! slot, and the device's own computes with the slot that is full. Refuses a panel that is larger than a chunk.

use crate::arena::{ALIGN, Arena, Ptr, Range, Ranges};
use crate::compile::{Args, Function, Kernels, Launch, Program};
use crate::device::Device;
use crate::error::{During, Error};
use crate::layout::{self, ExpertSlot};
use crate::ops::DeviceWeight;
use cudarc::driver::{result, sys};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tandem_spec::{Block, Linear, Panels, TensorSource, TensorType, Weight, panel};

/// Bytes of a chunk of panels on their way.
pub(crate) const CHUNK_BYTES: usize = 16 << 20;
/// Most rows of a panel.
pub(crate) const PANEL_ROWS_MAX: usize = 16;
/// Chunks of the ring.
const N_CHUNKS: usize = 4;
/// Slots for units: one is computed with while the other is filled.
const N_SLOTS: usize = 2;
/// Bytes of experts that make a unit.
const EXPERTS_BYTES: usize = 128 << 20;
/// Threads that pin mappings: the system's work for a page is most of the time.
const N_PINNERS: usize = 8;

#[repr(C)]
#[derive(Clone, Copy)]
struct UnpackArgs {
    source: Ptr,
    weight: Ptr,
    source_stride: u64,
    weight_stride: u64,
    n_rows: u32,
    n_columns: u32,
    n_panels: u32,
    first: u32,
}
// SAFETY: mirrors UnpackArgs in stream.cu, which compares sizes.
unsafe impl Args for UnpackArgs {}

/// Blocks of a row that a thread block of `unpack` takes: such that its shared memory suits every chip.
fn columns(ty: TensorType) -> usize {
    match ty.row().block_len {
        1 => 128,
        32 => 32,
        _ => 8,
    }
}

/// Bytes of shared memory of `unpack`: planes, and rows a bank apart (ROW_BYTES in stream.cu).
fn unpack_shared(ty: TensorType, panel_rows: usize) -> usize {
    let row = columns(ty) * ty.row().block_bytes;
    panel_rows * (row + row.next_multiple_of(128) + 4)
}

/// The program that sorts panels of `panel_rows` rows of a type into planes.
pub fn program(ty: TensorType, panel_rows: usize) -> Program {
    let fields: Vec<String> =
        panel::fields(ty).iter().map(|f| format!("{{{},{},{}}}", f.offset, f.len, f.unit)).collect();
    let planes: Vec<String> = layout::planes(ty).iter().map(usize::to_string).collect();
    Program::new("stream.cu", include_str!("stream.cu"))
        .args::<UnpackArgs>("UNPACK_ARGS")
        .define("TYPE", ty as u32)
        .define("BLOCK_BYTES", ty.row().block_bytes)
        .define("PANEL_ROWS", panel_rows)
        .define("COLUMNS", columns(ty))
        .define("FIELDS", fields.join(","))
        .define("N_FIELDS", fields.len())
        .define("PLANES", planes.join(","))
        .define("N_PLANES", planes.len())
}

/// What the host has of a block.
pub struct HostShare {
    /// Index of the block among the backend's.
    pub block: usize,
    /// The share, an FFN or a mixture of experts.
    pub share: Block<Weight>,
    /// Gate, up and down of an FFN; of a mixture the gates of its experts, then the ups, then the downs.
    pub panels: Vec<Panels>,
}

/// The shares that are streamed, and for which batches.
#[derive(Default)]
pub struct Streamed {
    /// Tokens of the smallest batch for which they are.
    pub from: usize,
    /// One a block.
    pub shares: Vec<HostShare>,
}

impl Streamed {
    /// The shares alone.
    pub fn blocks(&self) -> Vec<Block<Weight>> {
        self.shares.iter().map(|s| s.share.clone()).collect()
    }
}

/// Gate, up and down of a share, and how many experts they are stacks of.
fn stacks(share: &Block<Weight>) -> ([&Linear<Weight>; 3], usize) {
    match share {
        Block::Ffn(b) => ([&b.ffn_gate, &b.ffn_up, &b.ffn_down], 1),
        Block::Moe(b) => (b.stacks(), b.experts.len()),
        other => panic!("{} is no feed-forward block", other.name()),
    }
}

/// Whether a share whose matrices are packed in panels of `panel_rows` rows can be streamed: no panel is larger than a
/// chunk.
pub fn can_stream(share: &Block<Weight>, panel_rows: usize) -> bool {
    let row_bytes = |l: &Linear<Weight>| l.weight.row_bytes();
    stacks(share).0.into_iter().all(|l| panel_rows * row_bytes(l) <= CHUNK_BYTES)
}

/// A part of a share that is computed with at once.
#[derive(Clone, Debug)]
struct UnitLayout {
    share: usize,
    /// Which experts of the share; an FFN is one.
    experts: std::ops::Range<usize>,
    /// For each matrix its index among the share's panels, and its place in the slot: all gates, all ups, all downs.
    matrices: Vec<(usize, Range)>,
    /// Bytes of an expert in the slot.
    stride: usize,
}

/// Where everything lies on the device that streaming needs: a pure function of the shares.
#[derive(Clone, Debug)]
pub struct StreamLayout {
    units: Vec<UnitLayout>,
    slots: [Range; N_SLOTS],
    chunks: [Range; N_CHUNKS],
    /// By share: its weights that are no matrices, and the table of a mixture's experts.
    vectors: Vec<Vec<(Weight, Range)>>,
    tables: Vec<Option<Range>>,
    total: usize,
}

impl StreamLayout {
    /// The layout for `shares`.
    pub fn new(shares: &[Block<Weight>]) -> Self {
        let (mut units, mut vectors, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        let (mut slot_bytes, mut ranges) = (0, Ranges::default());
        for (i, share) in shares.iter().enumerate() {
            let (linears, n_experts) = stacks(share);
            let (parts, stride) = match share {
                Block::Moe(b) => {
                    tables.push(Some(ranges.take(8 * b.shape.n_experts)));
                    let slot = ExpertSlot::new(b, |w| w.ty);
                    (slot.parts, slot.bytes)
                }
                _ => {
                    tables.push(None);
                    let mut slot = Ranges::default();
                    (linears.map(|l| slot.take(layout::weight_bytes(&l.weight))), slot.total())
                }
            };
            let together = (EXPERTS_BYTES / stride.max(1)).clamp(1, n_experts.max(1));
            for first in (0..n_experts).step_by(together) {
                let experts = first..n_experts.min(first + together);
                let place = |part: Range, nth: usize| Range { offset: nth * stride + part.offset, ..part };
                let of = |(m, part)| experts.clone().map(move |e| (m * n_experts + e, place(part, e - first)));
                let matrices = parts.into_iter().enumerate().flat_map(of).collect();
                slot_bytes = slot_bytes.max(experts.len() * stride);
                units.push(UnitLayout { share: i, experts, matrices, stride });
            }
            let mut others = Vec::new();
            share.for_each(&mut |w| {
                if linears.iter().all(|l| l.weight != *w) {
                    others.push((w.clone(), ranges.take(layout::weight_bytes(w))));
                }
            });
            vectors.push(others);
        }
        let slots = [(); N_SLOTS].map(|()| ranges.take(slot_bytes));
        let chunks = [(); N_CHUNKS].map(|()| ranges.take(if shares.is_empty() { 0 } else { CHUNK_BYTES }));
        Self { units, slots, chunks, vectors, tables, total: ranges.total() }
    }

    /// Bytes of the arena.
    pub fn bytes(&self) -> usize {
        self.total
    }

    /// Of them, bytes of the slots, which grow with the largest unit, and of the chunks, which do not grow; the rest
    /// adds up over shares.
    pub fn shared_bytes(&self) -> (usize, usize) {
        let of = |ranges: &[Range]| ranges.iter().map(|r| r.bytes.next_multiple_of(ALIGN)).sum();
        (of(&self.slots), of(&self.chunks))
    }
}

/// Mappings that are pinned, by address, and their users.
static PINNED: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

/// Pinned mappings: the bus reads them at full speed and without the processor.
pub(crate) struct Pins(Vec<usize>);

impl Pins {
    /// Pins what `panels` lie in.
    pub fn of<'p>(device: &Device, panels: impl Iterator<Item = &'p Panels>) -> Self {
        let mut mappings: Vec<_> = panels.map(|p| (p.memory.mapping().start, p.memory.mapping().end)).collect();
        mappings.sort();
        mappings.dedup();
        Self::new(device, &mappings.into_iter().map(|(start, end)| start..end).collect::<Vec<_>>())
    }

    /// Pins `mappings`, several at a time. What the system refuses to pin stays as it is: the driver then copies it
    /// through memory of its own, at a third of the rate.
    fn new(device: &Device, mappings: &[std::ops::Range<usize>]) -> Self {
        let mut pinned = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
        let missing: Vec<_> = mappings.iter().filter(|m| !pinned.contains_key(&m.start)).collect();
        let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..N_PINNERS.min(missing.len()) {
                scope.spawn(|| {
                    while let Some(mapping) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                        // Every context may copy from it.
                        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE;
                        // SAFETY: the mapping lives as long as the panels in it, which outlive their pins.
                        let registered =
                            || unsafe { sys::cuMemHostRegister_v2(mapping.start as *mut _, mapping.len(), flags) };
                        if device.bind().is_ok() && registered().result().is_ok() {
                            done.lock().unwrap_or_else(PoisonError::into_inner).push(mapping.start);
                        }
                    }
                });
            }
        });
        for start in done.into_inner().unwrap_or_else(PoisonError::into_inner) {
            pinned.insert(start, 0);
        }
        let all = mappings.iter().map(|m| m.start).filter(|start| pinned.contains_key(start)).collect::<Vec<_>>();
        all.iter().for_each(|start| *pinned.get_mut(start).expect("in the map") += 1);
        Self(all)
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        let mut pinned = PINNED.lock().unwrap_or_else(PoisonError::into_inner);
        for start in &self.0 {
            let users = pinned.get_mut(start).expect("pinned in `new`");
            *users -= 1;
            if *users == 0 {
                pinned.remove(start);
                // SAFETY: registered in `new`; nobody copies from it any more.
                let _ = unsafe { sys::cuMemHostUnregister(*start as *mut _) };
            }
        }
    }
}

/// A copy of panels, and what sorts them into planes.
pub(crate) struct Chunk {
    /// First byte in main memory, and their number.
    pub host: usize,
    pub bytes: usize,
    pub function: Function,
    pub launch: Launch,
    /// `source` is what to take from the address of the chunk.
    args: UnpackArgs,
}

impl Chunk {
    /// What sorts the panels, when they are at `staging`.
    pub fn args_from(&self, staging: Ptr) -> impl Args {
        UnpackArgs { source: Ptr(staging.0.wrapping_sub(self.args.source.0)), ..self.args }
    }
}

/// A part of a block on the device.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    /// The share with the addresses of the unit; those of experts are in [`Parts::table`].
    pub block: Block<DeviceWeight>,
    /// Experts of the model that the unit holds.
    pub experts: std::ops::Range<usize>,
}

struct Unit {
    part: Part,
    chunks: Vec<Chunk>,
}

/// A stream and its events, destroyed with it.
pub(crate) struct Queue(pub sys::CUstream);

impl Queue {
    /// A stream that waits for no other.
    pub fn new(priority: i32) -> Result<Self, Error> {
        let kind = result::stream::StreamKind::NonBlocking;
        Ok(Self(result::stream::create_with_priority(kind, priority).during("creating a stream")?))
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: created in `new`, drained before.
        let _ = unsafe { result::stream::destroy(self.0) };
    }
}

pub(crate) struct Event(pub sys::CUevent);

impl Event {
    pub fn new() -> Result<Self, Error> {
        Self::with(0)
    }

    /// One whose waiters sleep: others need their cores.
    pub fn asleep() -> Result<Self, Error> {
        Self::with(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32)
    }

    fn with(flags: u32) -> Result<Self, Error> {
        let mut event = std::ptr::null_mut();
        let flags = flags | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: the driver writes the event.
        unsafe { sys::cuEventCreate(&mut event, flags) }.result().during("creating an event")?;
        Ok(Self(event))
    }

    /// Marks what `stream` has been given so far.
    pub fn record(&self, stream: sys::CUstream) -> Result<(), Error> {
        // SAFETY: both are alive.
        unsafe { result::event::record(self.0, stream) }.during("recording an event")
    }

    /// Waits until what was marked last is done; not at all where nothing was.
    pub fn wait(&self) -> Result<(), Error> {
        // SAFETY: the event is alive.
        unsafe { result::event::synchronize(self.0) }.during("waiting for an event")
    }

    /// Whether what was marked last is done.
    pub fn is_past(&self) -> Result<bool, Error> {
        // SAFETY: the event is alive.
        match unsafe { sys::cuEventQuery(self.0) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            state => state.result().during("asking for an event").map(|()| true),
        }
    }

    /// Lets `stream` go on only when what was marked last is done.
    pub fn hold(&self, stream: sys::CUstream) -> Result<(), Error> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: both are alive.
        unsafe { result::stream::wait_event(stream, self.0, flags) }.during("waiting for an event")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created in `new`.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

/// Two events of a piece of memory: it is full, it may be filled.
struct Turns {
    full: Event,
    free: Event,
}

impl Turns {
    fn new() -> Result<Self, Error> {
        Ok(Self { full: Event::new()?, free: Event::new()? })
    }
}

/// The units of a block.
struct BlockUnits {
    block: usize,
    units: std::ops::Range<usize>,
    /// Of a mixture, `[n_experts]` u64: where each streamed expert lies while its unit is there.
    table: Option<Ptr>,
    /// Whether the host has the whole block.
    are_all: bool,
}

/// Streams the units of a backend's blocks, in order.
pub(crate) struct Streamer {
    units: Vec<Unit>,
    blocks: Vec<BlockUnits>,
    /// The next unit to load, and the end of those that this batch needs.
    next: usize,
    end: usize,
    next_chunk: usize,
    chunks: Vec<(Ptr, Turns)>,
    slots: Vec<Turns>,
    unpinned_bytes: usize,
    copies: Queue,
    sorts: Queue,
    _pins: Pins,
    /// Keeps the panels alive.
    _shares: Vec<HostShare>,
    arena: Arena,
    device: Arc<Device>,
}

// SAFETY: driver handles may be used from any thread whose context is current, and the addresses are those of
// memory that `_shares` keeps.
unsafe impl Send for Streamer {}

impl Streamer {
    /// Memory, streams and copies for `shares`, whose small weights are read from `source`. Programs ([`programs`])
    /// must be prepared. `planned` is for an out-of-memory message.
    ///
    /// # Errors
    /// A panel that is too large, no memory, or what the driver says.
    pub fn new(
        device: &Arc<Device>,
        kernels: &Kernels,
        shares: Vec<HostShare>,
        source: &dyn TensorSource,
        planned: usize,
    ) -> Result<Self, Error> {
        let blocks: Vec<_> = shares.iter().map(|s| s.share.clone()).collect();
        let layout = StreamLayout::new(&blocks);
        let arena = Arena::new(device, "buffers for streamed weights", layout.bytes(), planned)?;
        for (weight, range) in layout.vectors.iter().flatten().filter(|(_, range)| range.bytes > 0) {
            arena.write(*range, &weight.runs(source).collect::<Vec<_>>().concat())?;
        }
        let (mut units, mut of_blocks) = (Vec::new(), Vec::<BlockUnits>::new());
        let first_expert = |share: usize| if let Block::Moe(b) = &blocks[share] { b.experts.start } else { 0 };
        for (i, range) in layout.tables.iter().enumerate() {
            let (Some(range), Block::Moe(b)) = (range, &blocks[i]) else { continue };
            let mut table = vec![0u64; b.shape.n_experts];
            for (number, unit) in layout.units.iter().enumerate().filter(|(_, unit)| unit.share == i) {
                let slot = arena.ptr(layout.slots[number % N_SLOTS]);
                for (nth, expert) in unit.experts.clone().enumerate() {
                    table[b.experts.start + expert] = slot.offset(nth * unit.stride).0;
                }
            }
            arena.write(*range, &table)?;
        }
        for (number, unit) in layout.units.iter().enumerate() {
            let share = &shares[unit.share];
            let (linears, n_experts) = stacks(&share.share);
            assert_eq!(share.panels.len(), 3 * n_experts, "matrices of {}", share.share.name());
            let slot = arena.ptr(layout.slots[number % N_SLOTS]);
            let matrices: Vec<(&Panels, Ptr)> =
                unit.matrices.iter().map(|(m, range)| (&share.panels[*m], slot.offset(range.offset))).collect();
            let n = unit.matrices.len() / 3;
            for (i, (panels, _)) in matrices.iter().enumerate() {
                let w = &linears[i / n].weight;
                let found = (panels.ty, panels.n_rows, panels.n_cols);
                assert_eq!(found, (w.ty, w.n_rows() / n_experts, w.n_cols), "panels of {}", w.name);
            }
            let Ok(block) = share.share.try_map(&mut |w| {
                let matrix = linears.iter().position(|l| l.weight == *w).map(|m| matrices[m * n].1);
                let vector = || layout.vectors[unit.share].iter().find(|(v, _)| v == w).map(|(_, r)| arena.ptr(*r));
                let ptr = matrix.or_else(vector).expect("every weight has a place");
                Ok::<_, Infallible>(DeviceWeight { ptr, ..DeviceWeight::unplaced(w) })
            });
            let first = first_expert(unit.share);
            let experts = first + unit.experts.start..first + unit.experts.end;
            units.push(Unit { part: Part { block, experts }, chunks: chunks(&matrices, kernels)? });
            match of_blocks.last_mut() {
                Some(of) if of.block == share.block => of.units.end = number + 1,
                _ => {
                    let table = layout.tables[unit.share].map(|range| arena.ptr(range));
                    let are_all = matches!(&share.share, Block::Moe(b) if b.experts.len() == b.shape.n_experts);
                    of_blocks.push(BlockUnits { block: share.block, units: number..number + 1, table, are_all });
                }
            }
        }
        assert!(of_blocks.is_sorted_by_key(|of| of.block), "shares in the order of their blocks, one a block");
        let pins = Pins::of(device, shares.iter().flat_map(|s| &s.panels));
        let is_pinned = |p: &&Panels| pins.0.contains(&p.memory.mapping().start);
        let unpinned = shares.iter().flat_map(|s| &s.panels).filter(|p| !is_pinned(p));
        let unpinned_bytes = unpinned.map(|p| p.n_panels() * p.panel_bytes()).sum();
        let (least, greatest) = result::stream::get_priority_range().during("asking for priorities")?;
        Ok(Self {
            units,
            blocks: of_blocks,
            next: 0,
            end: 0,
            next_chunk: 0,
            chunks: layout
                .chunks
                .iter()
                .map(|range| Ok((arena.ptr(*range), Turns::new()?)))
                .collect::<Result<_, Error>>()?,
            slots: (0..N_SLOTS).map(|_| Turns::new()).collect::<Result<_, _>>()?,
            unpinned_bytes,
            copies: Queue::new(least)?,
            // The short kernels that sort go ahead of long products: what they fill is waited for next.
            sorts: Queue::new(greatest)?,
            _pins: pins,
            _shares: shares,
            arena,
            device: device.clone(),
        })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// Bytes of panels that could not be pinned.
    pub fn unpinned_bytes(&self) -> usize {
        self.unpinned_bytes
    }

    /// Prepares a batch through the blocks `blocks`: the first units begin to arrive.
    ///
    /// # Errors
    /// What the driver says.
    pub fn begin(&mut self, blocks: std::ops::Range<usize>) -> Result<(), Error> {
        // A batch that failed may have left slots in use.
        self.slots.iter().try_for_each(|slot| slot.free.record(self.device.stream()))?;
        let units =
            |end: usize| self.blocks.iter().filter(|of| of.block < end).map(|of| of.units.end).max().unwrap_or(0);
        (self.next, self.end) = (units(blocks.start), units(blocks.end));
        (0..N_SLOTS).try_for_each(|_| self.load_next())
    }

    /// The units of block `block`, one after the other.
    pub fn parts(&mut self, block: usize) -> Parts<'_> {
        let of = self.blocks.iter().find(|of| of.block == block);
        let (units, table, are_all) = of.map_or((0..0, None, false), |of| (of.units.clone(), of.table, of.are_all));
        Parts { streamer: self, units, table, are_all, is_open: false }
    }

    /// Queues the copies of the next unit that this batch needs.
    fn load_next(&mut self) -> Result<(), Error> {
        if self.next == self.end {
            return Ok(());
        }
        let (unit, slot) = (&self.units[self.next], &self.slots[self.next % N_SLOTS]);
        self.next += 1;
        slot.free.hold(self.sorts.0)?;
        for chunk in &unit.chunks {
            let (ptr, turns) = &self.chunks[self.next_chunk];
            self.next_chunk = (self.next_chunk + 1) % N_CHUNKS;
            turns.free.hold(self.copies.0)?;
            // SAFETY: the panels live as long as `self`, which drains the stream before it goes; a chunk fits its
            // place.
            unsafe {
                let bytes = std::slice::from_raw_parts(chunk.host as *const u8, chunk.bytes);
                result::memcpy_htod_async(ptr.0, bytes, self.copies.0).during("streaming weights")?;
            }
            turns.full.record(self.copies.0)?;
            turns.full.hold(self.sorts.0)?;
            // SAFETY: the chunk holds the panels of the launch, the slot their matrices.
            unsafe { chunk.function.launch_on(self.sorts.0, chunk.launch, &chunk.args_from(*ptr))? };
            turns.free.record(self.sorts.0)?;
        }
        slot.full.record(self.sorts.0)
    }
}

impl Drop for Streamer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            let _ = self.device.wait("the last step");
            let _ = self.device.wait_for(self.copies.0, "the last copies");
            let _ = self.device.wait_for(self.sorts.0, "the last copies");
        }
    }
}

/// The parts of a block as they arrive.
pub(crate) struct Parts<'s> {
    streamer: &'s mut Streamer,
    units: std::ops::Range<usize>,
    table: Option<Ptr>,
    are_all: bool,
    is_open: bool,
}

impl Parts<'_> {
    /// Of a mixture that is streamed, `[n_experts]` u64: where each expert lies while its part is the last one
    /// returned, 0 for those that are not streamed.
    pub fn table(&self) -> Option<Ptr> {
        self.table
    }

    /// Whether these are all experts of the mixture: those that the GPU has as well are not needed.
    pub fn are_all(&self) -> bool {
        self.are_all
    }

    /// Gives the last part's place back and returns the next part: what is queued on the device's stream from here on
    /// finds it complete.
    ///
    /// # Errors
    /// What the driver says.
    pub fn next_part(&mut self) -> Result<Option<&Part>, Error> {
        let stream = self.streamer.device.stream();
        if self.is_open {
            self.streamer.slots[(self.units.start - 1) % N_SLOTS].free.record(stream)?;
            self.streamer.load_next()?;
            self.is_open = false;
        }
        let Some(unit) = self.units.next() else { return Ok(None) };
        assert!(unit < self.streamer.next, "unit {unit} is not under way: blocks run in order");
        self.streamer.slots[unit % N_SLOTS].full.hold(stream)?;
        self.is_open = true;
        Ok(Some(&self.streamer.units[unit].part))
    }
}

/// The programs that `shares` need.
pub(crate) fn programs(shares: &[HostShare]) -> Vec<Program> {
    unpackers(shares.iter().flat_map(|s| &s.panels))
}

/// The programs that sort `panels` into planes.
pub(crate) fn unpackers<'p>(panels: impl Iterator<Item = &'p Panels>) -> Vec<Program> {
    let mut keys: Vec<_> = panels.map(|p| (p.ty, p.panel_rows)).collect();
    keys.sort();
    keys.dedup();
    keys.into_iter().map(|(ty, panel_rows)| program(ty, panel_rows)).collect()
}

/// The copies that bring `matrices` to their addresses.
pub(crate) fn chunks(matrices: &[(&Panels, Ptr)], kernels: &Kernels) -> Result<Vec<Chunk>, Error> {
    let address = |i: usize| matrices[i].0.memory.bytes().as_ptr() as usize;
    let shape = |i: usize| {
        let p = matrices[i].0;
        (p.ty, p.n_rows, p.n_cols, p.panel_rows, p.memory.mapping())
    };
    let mut chunks = Vec::new();
    let mut first = 0;
    while first < matrices.len() {
        let (panels, weight) = matrices[first];
        let (n_panels, panel_bytes) = (panels.n_panels(), panels.panel_bytes());
        let most = panels.memory.bytes().len();
        assert!(n_panels * panel_bytes <= most, "{most} bytes for {n_panels} panels of {panel_bytes}");
        if panel_bytes > CHUNK_BYTES {
            let reason = format!("{} rows of {} elements are too large to stream", panels.panel_rows, panels.n_cols);
            return Err(Error::Unsupported(reason));
        }
        // Matrices of one shape, side by side and equally far apart on both sides, go together.
        let strides = |i: usize| (address(i).wrapping_sub(address(i - 1)), matrices[i].1.0 - matrices[i - 1].1.0);
        let end = (first + 1..matrices.len())
            .find(|&i| shape(i) != shape(first) || strides(i) != strides(first + 1) || strides(i).0 != most)
            .unwrap_or(matrices.len());
        let (source_stride, weight_stride) = if end > first + 1 { strides(first + 1) } else { (most, 0) };
        let start = |panel: usize| panel / n_panels * source_stride + panel % n_panels * panel_bytes;
        let function = kernels.function(
            &program(panels.ty, panels.panel_rows),
            "unpack",
            unpack_shared(panels.ty, panels.panel_rows),
        )?;
        let n_columns = panels.n_cols / panels.ty.row().block_len;
        let n = |n: usize| u32::try_from(n).expect("a matrix has fewer than 2^32 rows and blocks of a row");
        let (mut at, total) = (0, (end - first) * n_panels);
        while at < total {
            let mut next = at + 1;
            while next < total && start(next) + panel_bytes - start(at) <= CHUNK_BYTES {
                next += 1;
            }
            chunks.push(Chunk {
                host: address(first) + start(at),
                bytes: start(next - 1) + panel_bytes - start(at),
                function,
                launch: Launch::grid(next - at, n_columns.div_ceil(columns(panels.ty)), 1, 256)
                    .shared(unpack_shared(panels.ty, panels.panel_rows)),
                args: UnpackArgs {
                    source: Ptr(start(at) as u64),
                    weight,
                    source_stride: source_stride as u64,
                    weight_stride,
                    n_rows: n(panels.n_rows),
                    n_columns: n(n_columns),
                    n_panels: n(n_panels),
                    first: n(at),
                },
            });
            at = next;
        }
        first = end;
    }
    Ok(chunks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_spec::testing::Maker;
    use tandem_spec::{FfnShape, MoeShape};

    /// Slots hold the largest unit, experts are cut into units, and no two matrices of a unit overlap.
    #[test]
    fn units_fit_their_slots() {
        let mut maker = Maker::new(1, &[TensorType::Q8_0]);
        let ffn = Block::Ffn(maker.ffn(0, &FfnShape { n_embd: 256, n_ff: 512, rms_eps: 1e-6 }));
        let shape = MoeShape { n_embd: 1024, n_experts: 96, n_used: 2, n_ff: 512, n_ff_shared: 64, rms_eps: 1e-6 };
        let moe = Block::Moe(maker.moe(1, &shape)).share(5..96, false);
        let layout = StreamLayout::new(&[ffn, moe]);
        let expert_bytes = 3 * 1024 * 512 / 32 * 34;
        let together = EXPERTS_BYTES / expert_bytes;
        assert_eq!(layout.units.len(), 1 + 91usize.div_ceil(together));
        let mut seen = vec![0; 3 * 91];
        for unit in &layout.units {
            let (mut end, mut matrices) = (0, unit.matrices.clone());
            matrices.sort_by_key(|(_, range)| range.offset);
            for (matrix, range) in &matrices {
                assert!(range.offset >= end && range.offset + range.bytes <= layout.slots[0].bytes);
                end = range.offset + range.bytes;
                if unit.share == 1 {
                    seen[*matrix] += 1;
                }
            }
        }
        assert!(seen.iter().all(|n| *n == 1));
        assert_eq!(layout.vectors.iter().map(Vec::len).collect::<Vec<_>>(), [1, 2], "norms, and a router without rows");
        assert!(StreamLayout::new(&[]).bytes() == 0);
    }
}
