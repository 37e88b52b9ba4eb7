//! Products of packed matrices against the roofs of this machine: read bandwidth for one row of activations
//! (generation), 8-bit multiply-adds for many (prompts).
//! `cargo bench -p tandem-cpu --bench matmul -- [--threads N] [--isa NAME] [TYPE ...]`

use std::time::Instant;
use tandem_cpu::{ActivationBuffer, Forms, Isa, Matrix, OutRows, ReadTest};
use tandem_spec::TensorType;
use tandem_spec::testing::{Buffers, Rng, random_blocks};

/// Several times the last-level caches of the machines that we know.
const COLD_BYTES: usize = 1 << 30;

/// Seconds of each of `n` runs of `work` by every thread of the pool, ascending.
fn time(pool: &rayon::ThreadPool, n: usize, work: impl Fn(usize) + Sync) -> Vec<f64> {
    let mut seconds: Vec<f64> = (0..n)
        .map(|_| {
            let start = Instant::now();
            pool.broadcast(|context| work(context.index()));
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds
}

/// Part `i` of `n` of `0..len`.
fn part(len: usize, i: usize, n: usize) -> std::ops::Range<usize> {
    len * i / n..len * (i + 1) / n
}

/// Best GB/s of reading in contiguous parts.
fn read_roof(pool: &rayon::ThreadPool, threads: usize, isa: Isa) -> f64 {
    let memory = ReadTest::new(COLD_BYTES).expect("memory");
    let seconds = time(pool, 9, |i| memory.read(isa, part(memory.n_bytes(), i, threads)));
    COLD_BYTES as f64 / seconds[0] / 1e9
}

/// 8-bit multiply-adds into 32-bit sums, enough of them to hide their latency, all operands in registers.
#[cfg(target_arch = "x86_64")]
mod integer {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    pub const ROUNDS: usize = 500_000;

    /// Multiply-adds of one call.
    pub const AVX2_OPS: usize = ROUNDS * 12 * 32;
    #[target_feature(enable = "avx2")]
    pub fn avx2() {
        let (w, x, ones) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(5)), _mm256_set1_epi16(1));
        let mut sums = [_mm256_setzero_si256(); 12];
        for _ in 0..ROUNDS {
            for s in &mut sums {
                // Depends on the sum, so that it is not moved out of the loop.
                let products = _mm256_maddubs_epi16(w, _mm256_xor_si256(x, *s));
                *s = _mm256_add_epi32(*s, _mm256_madd_epi16(products, ones));
            }
        }
        black_box(sums);
    }

    /// Multiply-adds of one call.
    pub const AVX_VNNI_OPS: usize = ROUNDS * 12 * 32;
    #[target_feature(enable = "avx2,avxvnni")]
    pub fn avx_vnni() {
        let (w, x) = (_mm256_set1_epi8(black_box(3)), _mm256_set1_epi8(black_box(5)));
        let mut sums = [_mm256_setzero_si256(); 12];
        for _ in 0..ROUNDS {
            for s in &mut sums {
                *s = _mm256_dpbusd_avx_epi32(*s, w, x);
            }
        }
        black_box(sums);
    }

    /// Multiply-adds of one call.
    pub const AVX512_OPS: usize = ROUNDS * 16 * 64;
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    pub fn avx512() {
        let (w, x) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(5)));
        let mut sums = [_mm512_setzero_si512(); 16];
        for _ in 0..ROUNDS {
            for s in &mut sums {
                *s = _mm512_dpbusd_epi32(*s, w, x);
            }
        }
        black_box(sums);
    }
}

/// Best 10^9 multiply-adds per second of the instruction set's 8-bit dot product.
fn integer_roof(pool: &rayon::ThreadPool, threads: usize, isa: Isa) -> f64 {
    let (ops, seconds) = match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller chose an available instruction set.
        Isa::AvxVnni => (integer::AVX_VNNI_OPS, time(pool, 30, |_| unsafe { integer::avx_vnni() })),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller chose an available instruction set.
        Isa::Avx2 => (integer::AVX2_OPS, time(pool, 30, |_| unsafe { integer::avx2() })),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the caller chose an available instruction set.
        Isa::Amx | Isa::Avx512 => (integer::AVX512_OPS, time(pool, 30, |_| unsafe { integer::avx512() })),
        _ => return f64::NAN,
    };
    (ops * threads) as f64 / seconds[0] / 1e9
}

/// A packed matrix, and the GB/s at which it was packed.
fn matrix(pool: &rayon::ThreadPool, ty: TensorType, n_rows: usize, n_cols: usize, isa: Isa) -> (Matrix, f64) {
    // Random rows, repeated: values do not change the speed, but subnormals and NaN might.
    let (mut source, unique) = (Buffers::default(), 64);
    let mut bytes = random_blocks(ty, unique * n_cols, 1.0, &mut Rng::new(1)).repeat(n_rows.div_ceil(unique));
    bytes.truncate(n_rows * ty.row_bytes(n_cols).expect("whole blocks"));
    let weight = source.add("w", ty, &[n_cols, n_rows], bytes);
    let start = Instant::now();
    let matrix = pool.install(|| Matrix::pack(&weight, &source, isa).expect("memory"));
    let rate = matrix.n_bytes() as f64 / start.elapsed().as_secs_f64() / 1e9;
    (matrix, rate)
}

fn activations(ty: TensorType, n_rows: usize, n_cols: usize) -> ActivationBuffer {
    let buffer = ActivationBuffer::new(n_rows * n_cols, Forms::of(ty)).expect("memory");
    let x = buffer.view(0, n_rows, n_cols, Forms::of(ty));
    for row in 0..n_rows {
        // SAFETY: one thread.
        unsafe { x.write(row, 0, &Rng::new(row as u64).normals(n_cols, 1.0)) };
    }
    buffer
}

fn main() {
    let mut threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let (mut isa, mut types, mut args) = (Isa::detect(), Vec::new(), std::env::args().skip(1));
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--bench" => {}
            "--threads" => threads = args.next().and_then(|n| n.parse().ok()).expect("--threads N"),
            "--isa" => {
                let name = args.next().expect("--isa NAME");
                isa = Isa::by_name(&name).expect("an ISA");
            }
            name => types.extend(tandem_spec::tensor_type::TYPES.iter().map(|r| r.ty).find(|ty| ty.name() == name)),
        }
    }
    use TensorType::*;
    if types.is_empty() {
        types = vec![Q4_K, Q5_K, Q6_K, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, IQ4_XS, MXFP4, Q2_K, Q3_K, BF16, F16, F32];
    }
    assert!(isa.is_available(), "this processor has no {}", isa.name());
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    let (read, integer) = (read_roof(&pool, threads, isa), integer_roof(&pool, threads, isa));
    println!("{} {threads} threads: read {read:.1} GB/s, 8-bit dot products {integer:.0} GMAC/s", isa.name());
    println!(
        "type    cols | packing: GB/s | one row: GB/s best, median, share of read roof | rows, matrix in the cache: GMAC/s for 1, 2, 4, 8, 16, 64, 512, share of integer roof"
    );
    for ty in types {
        for n_cols in [1024, 3584] {
            let row_bytes = ty.row_bytes(n_cols).expect("whole blocks");
            let (cold, pack) = matrix(&pool, ty, COLD_BYTES / row_bytes, n_cols, isa);
            let run = |m: &Matrix, x: &ActivationBuffer, n_rows: usize, n: usize| {
                let x = x.view(0, n_rows, n_cols, Forms::of(ty));
                let mut out = vec![0f32; m.n_rows() * n_rows];
                let ptr = out.as_mut_ptr() as usize;
                time(&pool, n, |i| {
                    // SAFETY: each thread multiplies panels of its own into a buffer that outlives the run.
                    let out = unsafe { OutRows::new(ptr as *mut f32, m.n_rows(), n_rows, 0..m.n_rows()) };
                    m.mul(part(m.n_panels(), i, threads), &x, &out);
                })
            };
            let seconds = run(&cold, &activations(ty, 1, n_cols), 1, 9);
            let rate = |s: f64| cold.n_bytes() as f64 / s / 1e9;
            let (best, median) = (rate(seconds[0]), rate(seconds[4]));
            print!("{:7} {n_cols:4} | {pack:5.1} | {best:6.1} {median:6.1} {:4.0} % |", ty.name(), 100.0 * best / read);
            drop(cold);
            let (warm, _) = matrix(&pool, ty, 1024 * threads, n_cols, isa);
            for n_rows in [1, 2, 4, 8, 16, 64, 512] {
                let seconds = run(&warm, &activations(ty, n_rows, n_cols), n_rows, if n_rows < 512 { 40 } else { 11 });
                let rate = (warm.n_rows() * n_cols * n_rows) as f64 / seconds[0] / 1e9;
                print!(" {rate:6.1}");
                if n_rows == 512 {
                    print!(" {:4.0} %", 100.0 * rate / integer);
                }
            }
            println!();
        }
    }
}
