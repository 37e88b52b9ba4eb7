//! The uploader: reader threads, each with a stream and pinned buffers of its own, copy the file's bytes asynchronously
//! and sort them into planes (`layout`) on the device. Every byte crosses the bus once; while one reader's piece is
//! sorted, those of others are copied. Refuses nothing: sizes and types were checked when the model was described.

use crate::arena::{Arena, Pinned, Ptr, Range};
use crate::compile::{Args, Function, Kernels, Launch, Program};
use crate::device::Device;
use crate::error::{During, Error};
use crate::stream::{Event, Queue};
use cudarc::driver::result;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use tandem_spec::{TensorSource, TensorType, Weight};

/// Bytes of one buffer in main memory, and of the one on the device that it is copied to.
const BUFFER_BYTES: usize = 2 << 20;
/// Buffers of a reader: one is filled while another is copied.
const N_BUFFERS: usize = 2;
/// Reader threads. One reads 4 to 5 GB/s from the page cache of the machine where the bus takes 55.
const N_READERS: usize = 12;

/// Bytes that [`upload`] needs while it runs: on the device beside the arena, and of pinned memory.
pub const STAGING_BYTES: usize = BUFFER_BYTES * N_BUFFERS * N_READERS;

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

/// Copies every item to its range of `arena`. `progress` is told the bytes copied so far, from this thread.
/// Programs ([`program`]) of all quantised types must be prepared. `planned` is for an out-of-memory message.
///
/// # Errors
/// No memory for the buffers, or what the driver says.
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
    let mut functions = HashMap::new();
    for ty in items.iter().map(|i| i.weight.ty).filter(|ty| ty.is_quantised()) {
        if let Entry::Vacant(entry) = functions.entry(ty) {
            entry.insert(kernels.function(&program(ty), "relayout", 0)?);
        }
    }
    let buffers = Pinned::new(STAGING_BYTES)?;
    let staging = Arena::new(device, "staging buffers for loading", STAGING_BYTES, planned)?;
    let (pieces, next) = (cut(items), AtomicUsize::new(0));
    let upload = Upload { device, functions, arena, items, source, buffers, staging, pieces, next };
    let (tell, told) = mpsc::channel();
    std::thread::scope(|scope| {
        let start = |reader| {
            let (upload, tell) = (&upload, tell.clone());
            scope.spawn(move || upload.read_and_copy(reader, &tell))
        };
        let readers: Vec<_> = (0..N_READERS).map(start).collect();
        drop(tell);
        let mut done = 0;
        for bytes in told {
            done += bytes;
            progress(done);
        }
        readers.into_iter().try_for_each(|reader| reader.join().expect("a reader does not panic"))
    })
}

/// What the readers share.
struct Upload<'a> {
    device: &'a Device,
    functions: HashMap<TensorType, Function>,
    arena: &'a Arena,
    items: &'a [Item],
    source: &'a dyn TensorSource,
    /// `[N_READERS, N_BUFFERS, BUFFER_BYTES]`
    buffers: Pinned,
    /// Likewise.
    staging: Arena,
    pieces: Vec<Piece>,
    /// First piece that no reader has taken.
    next: AtomicUsize,
}

impl Upload<'_> {
    /// Number `reader` of the readers: takes pieces until none is left, or another reader failed, and waits until its
    /// own are where they belong.
    fn read_and_copy(&self, reader: usize, tell: &mpsc::Sender<usize>) -> Result<(), Error> {
        self.device.bind()?;
        let queue = Queue::new(0)?;
        let copied = self.copy_pieces(reader, &queue, tell);
        if copied.is_err() {
            self.next.store(self.pieces.len(), Ordering::Relaxed);
        }
        // Buffers are given back when nothing reads them any more, whatever happened.
        copied.and(self.device.wait_for(queue.0, "loading"))
    }

    fn copy_pieces(&self, reader: usize, queue: &Queue, tell: &mpsc::Sender<usize>) -> Result<(), Error> {
        let copied = (0..N_BUFFERS).map(|_| Event::new()).collect::<Result<Vec<_>, _>>()?;
        for (b, copied) in copied.iter().enumerate().cycle() {
            let Some(piece) = self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)) else { break };
            copied.wait()?;
            let offset = (reader * N_BUFFERS + b) * BUFFER_BYTES;
            // SAFETY: the buffer is this reader's, `cut` makes no longer piece, and its last copy is done.
            let bytes = unsafe { std::slice::from_raw_parts_mut(self.buffers.as_ptr::<u8>().add(offset), piece.bytes) };
            let weight = &self.items[piece.item].weight;
            weight.read(self.source, piece.first_block * weight.ty.row().block_bytes, bytes);
            let staging = self.staging.ptr(Range { offset, bytes: BUFFER_BYTES });
            self.queue(piece, bytes, staging, queue, copied)?;
            let _ = tell.send(piece.bytes); // whoever wants to know lives as long as the readers
        }
        Ok(())
    }

    /// Queues the copy of a piece, which `copied` marks, and its relayout.
    fn queue(&self, piece: &Piece, bytes: &[u8], staging: Ptr, queue: &Queue, copied: &Event) -> Result<(), Error> {
        let item = &self.items[piece.item];
        let row = item.weight.ty.row();
        let weight = self.arena.ptr(item.range);
        let quantised = item.weight.ty.is_quantised();
        // Floats go where they belong, in as many copies as matrices are touched.
        let (first_byte, per_matrix) = (piece.first_block * row.block_bytes, item.matrix_bytes());
        let mut done = 0;
        while done < bytes.len() {
            let (matrix, at) = ((first_byte + done) / per_matrix, (first_byte + done) % per_matrix);
            let n = if quantised { bytes.len() } else { (per_matrix - at).min(bytes.len() - done) };
            let target = if quantised { staging } else { weight.offset(matrix * item.stride + at) };
            // SAFETY: the buffer stays filled until `copied` has passed. The target lies in the item's range of the
            // arena, which `cut` found as long as its matrices at their strides, or is this buffer's part of the
            // staging memory, which the previous relayout on this stream has left.
            unsafe { result::memcpy_htod_async(target.0, &bytes[done..done + n], queue.0) }
                .during("copying weights")?;
            done += n;
        }
        copied.record(queue.0)?;
        if quantised {
            let n_blocks = bytes.len() / row.block_bytes;
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
            unsafe { self.functions[&item.weight.ty].launch_on(queue.0, launch, &args)? };
        }
        Ok(())
    }
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
