//! Reading memory in a plain loop: the roof of matrix-vector products, but for 1 to 6 % that idle instructions between
//! its lines would add on a Sapphire Rapids. Owns the loop that measures it.

use crate::gemm::prefetch;
use crate::matrix::Storage;
use crate::simd::{self, Kernel, Simd};
use crate::{Error, Isa};
use std::hint::black_box;
use std::ops::Range;

/// Memory like that of packed weights, to measure how fast it is read.
pub struct ReadTest(Storage);

impl ReadTest {
    /// `len` bytes, all of them written, so that each page is there. An error where the memory is not.
    pub fn new(len: usize) -> Result<Self, Error> {
        let mut memory = Storage::zeroed(len)?;
        Storage::end_mapping(); // or the rest of the mapping would keep this
        memory.fill(1);
        Ok(Self(memory))
    }

    /// Bytes.
    pub fn n_bytes(&self) -> usize {
        self.0.len()
    }

    /// Reads the whole 512-byte chunks of `range`, which lies within the memory.
    pub fn read(&self, isa: Isa, range: Range<usize>) {
        read(isa, &self.0[range]);
    }
}

/// Reads the whole 512-byte chunks of `bytes`.
pub(crate) fn read(isa: Isa, bytes: &[u8]) {
    simd::run(isa, 0, Read(bytes));
}

/// Floats in a chunk.
const CHUNK: usize = 128;
/// Floats ahead of the loop that are asked for with AVX-512. Only every second line is: the processor brings its
/// neighbour, and has more lines on their way than it can be asked for. Two cores of a Sapphire Rapids read 35 to 36
/// GB/s so, 28 with every line, 31 with none; a Zen 3 is best left alone.
const AHEAD: usize = 256;

struct Read<'a>(&'a [u8]);

impl Kernel for Read<'_> {
    type Output = ();
    #[inline(always)]
    fn run<V: Simd>(self) {
        let mut sums = [V::splat(0.0); 8];
        for chunk in self.0.as_chunks::<{ 4 * CHUNK }>().0 {
            let chunk = chunk.as_ptr().cast::<f32>();
            for i in (0..CHUNK).step_by(8 * V::LANES) {
                for (j, sum) in sums.iter_mut().enumerate() {
                    let at = i + j * V::LANES;
                    if V::LANES == 16 && j % 2 == 0 {
                        prefetch(chunk.wrapping_add(AHEAD + at));
                    }
                    // SAFETY: `at + LANES` is at most the length of a chunk.
                    *sum = sum.add(unsafe { V::load(chunk.add(at)) });
                }
            }
        }
        black_box(sums.map(V::sum));
    }
}
