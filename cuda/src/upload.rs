//! The uploader: the file's bytes through a ring of pinned buffers, filled by several reader threads, copied
//! asynchronously and sorted into planes (`layout`) on the device. Every byte crosses the bus once.
//! Refuses nothing: sizes and types were checked when the model was described.

use crate::arena::{Arena, Ptr, Range};
use crate::compile::{Args, Function, Kernels, Launch, Program};
use crate::device::Device;
use crate::error::{During, Error};
use cudarc::driver::{result, sys};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use tandem_spec::{TensorSource, TensorType, Weight};

/// Bytes of one staging buffer; the device holds as many beside the weights while loading.
const BUFFER_BYTES: usize = 16 << 20;
/// Buffers of the ring.
const N_BUFFERS: usize = 8;
/// Reader threads: 8 read 46 GB/s from the page cache of the machine where the bus takes 55.
const N_READERS: usize = 8;

/// Device bytes that [`upload`] needs beside the arena while it runs.
pub const STAGING_BYTES: usize = BUFFER_BYTES * N_BUFFERS;

#[repr(C)]
#[derive(Clone, Copy)]
struct RelayoutArgs {
    source: Ptr,
    weight: Ptr,
    group: u64,
    stride: u64,
    first: u64,
    n_blocks: u64,
}
// SAFETY: mirrors RelayoutArgs in upload.cu, which compares sizes.
unsafe impl Args for RelayoutArgs {}

#[repr(C)]
#[derive(Clone, Copy)]
struct DecodeArgs {
    weight: Ptr,
    out: Ptr,
    n_total: u64,
    n: u64,
}
// SAFETY: mirrors DecodeArgs in upload.cu, which compares sizes.
unsafe impl Args for DecodeArgs {}

/// The relayout program of a type.
pub fn program(ty: TensorType) -> Program {
    Program::new("upload.cu", include_str!("upload.cu"))
        .args::<RelayoutArgs>("RELAYOUT_ARGS")
        .args::<DecodeArgs>("DECODE_ARGS")
        .define("TYPE", ty as u32)
        .define("BLOCK_BYTES", ty.row().block_bytes)
}

/// A weight and where its device layout goes.
#[derive(Clone, Debug)]
pub struct Item {
    /// Which rows of which file tensor.
    pub weight: Weight,
    /// Range of the arena: from the first byte to the last.
    pub range: Range,
    /// Matrices of equal size that the weight is a stack of, each with planes of its own.
    pub n_matrices: usize,
    /// Bytes from one matrix to the next.
    pub stride: usize,
}

impl Item {
    /// One matrix, in a range of [`crate::layout::weight_bytes`].
    pub fn whole(weight: Weight, range: Range) -> Self {
        Self { weight, range, n_matrices: 1, stride: range.bytes }
    }

    /// `n` matrices: `part` of each of the `slots`, which are `stride` bytes apart.
    pub fn stack(weight: Weight, slots: Range, part: Range, n: usize, stride: usize) -> Self {
        let range = match n {
            0 => slots,
            _ => Range { offset: slots.offset + part.offset, bytes: (n - 1) * stride + part.bytes },
        };
        Self { weight, range, n_matrices: n, stride }
    }

    fn matrix_bytes(&self) -> usize {
        self.weight.n_bytes() / self.n_matrices
    }
}

/// A piece of an item that fits one buffer: whole blocks of its rows, one after the other.
struct Piece {
    item: usize,
    first_block: usize,
    bytes: usize,
}

/// Pinned host memory.
struct Pinned(*mut u8);

// SAFETY: plain memory; each buffer is used by one thread at a time.
unsafe impl Send for Pinned {}

struct Ring {
    device: Arc<Device>,
    buffers: Vec<*mut u8>,
    events: Vec<sys::CUevent>,
    staging: Arena,
}

impl Ring {
    fn new(device: &Arc<Device>, planned: usize) -> Result<Self, Error> {
        let staging = Arena::new(device, "staging buffers for loading", STAGING_BYTES, planned)?;
        let mut ring = Self { device: device.clone(), buffers: Vec::new(), events: Vec::new(), staging };
        for _ in 0..N_BUFFERS {
            // SAFETY: plain pinned allocation and event, freed in `drop`.
            ring.buffers
                .push(unsafe { result::malloc_host(BUFFER_BYTES, 0) }.during("allocating pinned memory")?.cast());
            ring.events
                .push(result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).during("creating an event")?);
        }
        Ok(ring)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let _ = self.device.bind().and_then(|()| self.device.wait("loading"));
        // SAFETY: allocated in `new`; the stream is idle.
        unsafe {
            for p in self.buffers.drain(..) {
                let _ = result::free_host(p.cast());
            }
            for e in self.events.drain(..) {
                let _ = result::event::destroy(e);
            }
        }
    }
}

/// Copies every item to its range of `arena`. `progress` is told the bytes copied so far, from this thread.
/// Programs ([`program`]) of all quantised types must be prepared. `planned` is for an out-of-memory message.
///
/// # Errors
/// No memory for the staging buffers, or what the driver says.
pub fn upload(
    device: &Arc<Device>,
    kernels: &Kernels,
    arena: &Arena,
    items: &[Item],
    source: &dyn TensorSource,
    planned: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<(), Error> {
    device.bind()?;
    let pieces = cut(items);
    let mut functions: HashMap<TensorType, Function> = HashMap::new();
    for ty in items.iter().map(|i| i.weight.ty).filter(|ty| ty.is_quantised()) {
        if let Entry::Vacant(entry) = functions.entry(ty) {
            entry.insert(kernels.function(&program(ty), "relayout", 0)?);
        }
    }
    let ring = Ring::new(device, planned)?;
    let next = AtomicUsize::new(0);
    let (give_free, take_free) = mpsc::channel::<(usize, Pinned)>();
    let take_free = std::sync::Mutex::new(take_free);
    let (give_full, take_full) = mpsc::channel::<(usize, usize, Pinned)>();
    std::thread::scope(|scope| {
        for _ in 0..N_READERS {
            let give_full = give_full.clone();
            let (next, take_free, pieces) = (&next, &take_free, &pieces);
            scope.spawn(move || {
                loop {
                    // A piece is taken together with a buffer, so that a reader without a buffer holds no piece.
                    let (buffer, memory, i) = {
                        let free = take_free.lock().expect("no reader panics with the lock");
                        let Ok((buffer, memory)) = free.recv() else { return };
                        let i = next.fetch_add(1, Ordering::Relaxed);
                        (buffer, memory, i)
                    };
                    let Some(piece) = pieces.get(i) else { return };
                    // SAFETY: the buffer holds BUFFER_BYTES, `cut` makes no longer piece, and no one else uses it now.
                    let buffer_bytes = unsafe { std::slice::from_raw_parts_mut(memory.0, piece.bytes) };
                    let weight = &items[piece.item].weight;
                    weight.read(source, piece.first_block * weight.ty.row().block_bytes, buffer_bytes);
                    if give_full.send((i, buffer, memory)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(give_full);
        for (i, p) in ring.buffers.iter().enumerate() {
            give_free.send((i, Pinned(*p))).expect("readers wait");
        }
        // Copies of a buffer and their events are queued in order; the oldest is waited for when none is free.
        let mut in_flight = std::collections::VecDeque::new();
        let mut done = 0;
        for _ in 0..pieces.len() {
            let (i, buffer, memory) = match take_full.try_recv() {
                Ok(full) => full,
                Err(_) => {
                    while let Some((buffer, memory)) = in_flight.pop_front() {
                        // SAFETY: the event was recorded after the copy from this buffer.
                        unsafe { result::event::synchronize(ring.events[buffer]) }.during("waiting for a copy")?;
                        let _ = give_free.send((buffer, memory));
                        if in_flight.len() < N_BUFFERS / 2 {
                            break;
                        }
                    }
                    take_full.recv().expect("readers live while pieces are left")
                }
            };
            queue(device, &ring, arena, items, &functions, &pieces[i], buffer, &memory)?;
            in_flight.push_back((buffer, memory));
            done += pieces[i].bytes;
            progress(done);
        }
        drop(give_free);
        device.wait("loading")
    })
}

/// Queues the copy of a piece and its relayout.
fn queue(
    device: &Device,
    ring: &Ring,
    arena: &Arena,
    items: &[Item],
    functions: &HashMap<TensorType, Function>,
    piece: &Piece,
    buffer: usize,
    memory: &Pinned,
) -> Result<(), Error> {
    let item = &items[piece.item];
    let row = item.weight.ty.row();
    let weight = arena.ptr(item.range);
    let quantised = item.weight.ty.is_quantised();
    let staging = ring.staging.ptr(Range { offset: buffer * BUFFER_BYTES, bytes: BUFFER_BYTES });
    // Floats go where they belong, in as many copies as matrices are touched.
    let (first_byte, per_matrix) = (piece.first_block * row.block_bytes, item.matrix_bytes());
    let mut done = 0;
    while done < piece.bytes {
        let (matrix, at) = ((first_byte + done) / per_matrix, (first_byte + done) % per_matrix);
        let n = if quantised { piece.bytes } else { (per_matrix - at).min(piece.bytes - done) };
        let target = if quantised { staging } else { weight.offset(matrix * item.stride + at) };
        // SAFETY: the buffer holds the piece and stays filled until its event has passed. The target lies in the item's
        // range of the arena, which `cut` found as long as its matrices at their strides, or is this buffer's part of
        // the staging memory, which the previous relayout on this stream has left.
        unsafe {
            let bytes = std::slice::from_raw_parts(memory.0.add(done), n);
            result::memcpy_htod_async(target.0, bytes, device.stream()).during("copying weights")?;
        }
        done += n;
    }
    // SAFETY: event and stream are valid.
    unsafe { result::event::record(ring.events[buffer], device.stream()) }.during("recording an event")?;
    if quantised {
        let n_blocks = piece.bytes / row.block_bytes;
        let args = RelayoutArgs {
            source: staging,
            weight,
            group: (per_matrix / row.block_bytes) as u64,
            stride: item.stride as u64,
            first: piece.first_block as u64,
            n_blocks: n_blocks as u64,
        };
        let launch = Launch::new((n_blocks * row.block_len / 32).div_ceil(256), 256);
        // SAFETY: the source holds the `n_blocks` of the piece; the target holds all matrices at their strides, as
        // `cut` compared, and `first` and `n_blocks` count blocks of them.
        unsafe { functions[&item.weight.ty].launch(device, launch, &args)? };
    }
    Ok(())
}

/// All items cut into pieces of whole blocks that fit a buffer.
fn cut(items: &[Item]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    for (i, item) in items.iter().enumerate() {
        let block_bytes = item.weight.ty.row().block_bytes;
        let total = item.weight.n_bytes();
        assert_eq!(item.range.bytes, (item.n_matrices - 1) * item.stride + item.matrix_bytes(), "{}", item.weight.name);
        let most = BUFFER_BYTES / block_bytes * block_bytes;
        for offset in (0..total).step_by(most) {
            pieces.push(Piece { item: i, first_block: offset / block_bytes, bytes: most.min(total - offset) });
        }
    }
    pieces
}

/// Decodes `n` elements of a weight at `weight` to floats at `out`: for tests. The program must be prepared.
///
/// # Errors
/// What the driver says.
///
/// # Safety
/// Both addresses must hold `n` elements, `n` a whole number of blocks.
pub unsafe fn decode(
    device: &Device,
    kernels: &Kernels,
    ty: TensorType,
    weight: Ptr,
    out: Ptr,
    n: usize,
) -> Result<(), Error> {
    let args = DecodeArgs { weight, out, n_total: (n / ty.row().block_len) as u64, n: n as u64 };
    let function = kernels.function(&program(ty), "decode", 0)?;
    // SAFETY: vouched for by the caller.
    unsafe { function.launch(device, Launch::new(n.div_ceil(256), 256), &args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_every_block_of_gathered_rows_once() {
        let n_cols = 1 << 20;
        let weight = Weight::new("w".into(), 0, TensorType::Q6_K, 50, n_cols).with_rows([3..30, 40..41]);
        let item = Item::whole(weight.clone(), Range { offset: 0, bytes: weight.n_bytes() });
        let pieces = cut(&[item]);
        let mut block = 0;
        for p in &pieces {
            assert_eq!(p.first_block, block);
            assert!(p.bytes <= BUFFER_BYTES && p.bytes % 210 == 0);
            block += p.bytes / 210;
        }
        assert_eq!(block, 28 * n_cols / 256);
    }
}
