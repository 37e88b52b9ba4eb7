//! Every supported type on every instruction set of this processor against exact decodes with sums in f64.

use super::*;
use crate::activations::{ActivationBuffer, BLOCK_LEN, CODES_LEN, Forms, SUPER_BLOCK_LEN};
use tandem_spec::tensor_type::TYPES;
use tandem_spec::testing::{Buffers, Poisoned, Rng, random_blocks};

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

fn types() -> impl Iterator<Item = TensorType> {
    TYPES.iter().map(|row| row.ty).filter(|ty| ty.is_supported())
}

/// `x` `[n_rows, n_cols]` as activations for `ty`, and what its form stands for.
fn activations<'a>(
    buffer: &'a ActivationBuffer,
    ty: TensorType,
    x: &[f32],
    n_cols: usize,
) -> (Activations<'a>, Vec<f64>) {
    let (n_rows, forms) = (x.len() / n_cols, Forms::of(ty));
    let activations = buffer.view(0, n_rows, n_cols, forms);
    for (row, values) in x.chunks(n_cols).enumerate() {
        let half = n_cols / 2 / forms.columns_together() * forms.columns_together();
        // SAFETY: one thread.
        unsafe {
            activations.write(row, 0, &values[..half]);
            activations.write(row, half, &values[half..]);
        }
    }
    let meant = (0..x.len()).map(|i| {
        let (row, col) = (i / n_cols, i % n_cols);
        // SAFETY: everything was written, in the one form that was asked for.
        let (scale, code) = unsafe {
            if forms.codes_256 {
                let block = &*activations.super_blocks().add(col / SUPER_BLOCK_LEN * n_rows + row);
                let codes = &*activations.super_codes().add(col / CODES_LEN * n_rows + row);
                (block.scale, codes.0[col % CODES_LEN])
            } else if forms.codes_32 {
                let at = col / BLOCK_LEN * n_rows + row;
                ((*activations.blocks().add(at)).scale, (*activations.block_codes().add(at)).0[col % BLOCK_LEN])
            } else {
                return f64::from(*activations.floats().add(i));
            }
        };
        f64::from(scale) * f64::from(code)
    });
    (activations, meant.collect())
}

fn product(w: &[f32], x: &[f64], n_cols: usize) -> Vec<f64> {
    let dot = |w: &[f32], x: &[f64]| w.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
    x.chunks(n_cols).flat_map(|x| w.chunks(n_cols).map(move |w| dot(w, x))).collect()
}

fn check(ty: TensorType, isa: Isa, n_rows: usize, n_cols: usize, n_tokens: usize) {
    let mut rng = Rng::new((n_rows * 1_000_000 + n_cols * 1000 + n_tokens) as u64);
    let mut source = Buffers::default();
    let bytes = random_blocks(ty, n_rows * n_cols, 1.0, &mut rng);
    let mut w = vec![f32::NAN; n_rows * n_cols];
    ty.decode(&bytes, &mut w);
    let weight = source.add("w", ty, &[n_cols, n_rows], bytes);
    let matrix = Matrix::pack(&weight, &source, isa).expect("memory");
    assert_eq!(matrix.n_bytes(), Matrix::packed_bytes(n_rows, n_cols, ty, isa));

    let mut decoded = vec![f32::NAN; n_cols];
    for (row, w) in w.chunks(n_cols).enumerate() {
        matrix.decode_row(row, &mut decoded);
        assert!(decoded.iter().zip(w).all(|(a, b)| a.to_bits() == b.to_bits()), "{ty} {isa:?}: row {row}");
    }

    // Blocks of very different magnitudes, so that a wrong scale shows.
    let mut x = rng.normals(n_tokens * n_cols, 1.0);
    x.chunks_mut(BLOCK_LEN.min(n_cols)).for_each(|x| {
        let factor = rng.uniform(-3.0, 3.0).exp2() as f32;
        x.iter_mut().for_each(|x| *x *= factor);
    });
    let buffer = ActivationBuffer::new(x.len(), Forms::of(ty)).expect("memory");
    let (activations, rounded) = activations(&buffer, ty, &x, n_cols);
    let mut out = Poisoned::new(n_tokens * n_rows);
    // SAFETY: the output is a buffer of this thread.
    let rows = unsafe { OutRows::new(out.out().as_mut_ptr(), n_rows, n_tokens, 0..n_rows) };
    let middle = matrix.n_panels() / 2;
    matrix.mul(middle..matrix.n_panels(), &activations, &rows);
    matrix.mul(0..middle, &activations, &rows);

    let exact: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    let got = out.checked();
    // Root mean square of the error over that of the products' expected size, which no cancellation makes small.
    let error = |x: &[f64]| {
        let (squares, x2): (Vec<f32>, Vec<f64>) =
            (w.iter().map(|w| w * w).collect(), x.iter().map(|x| x * x).collect());
        let norm: f64 = product(&squares, &x2, n_cols).iter().sum();
        let error: f64 = got.iter().zip(product(&w, x, n_cols)).map(|(g, w)| (f64::from(*g) - w).powi(2)).sum();
        if error.is_finite() { (error / norm).sqrt() } else { f64::INFINITY }
    };
    let case = format!("{ty} on {isa:?}, [{n_rows}, {n_cols}] x {n_tokens}");
    let (kernel, rounding) = (error(&rounded), error(&exact));
    assert!(kernel < 1e-5, "{case}: error {kernel:e} against the activations as they are stored");
    assert!(rounding < 0.05, "{case}: error {rounding:e} against the activations");
}

/// Products that go past the caches are the same bits, at the start of a line and elsewhere, and touch nothing else.
#[test]
fn products_past_the_caches_are_the_same() {
    const N_ROWS: usize = 67;
    for (isa, ty, n_tokens) in isas().flat_map(|isa| types().flat_map(move |ty| [(isa, ty, 1), (isa, ty, 65)])) {
        let (n_cols, mut rng, mut source) = (2 * ty.row().block_len.max(16), Rng::new(5), Buffers::default());
        let weight = source.add("w", ty, &[n_cols, N_ROWS], random_blocks(ty, N_ROWS * n_cols, 1.0, &mut rng));
        let matrix = Matrix::pack(&weight, &source, isa).expect("memory");
        let x = rng.normals(n_tokens * n_cols, 1.0);
        let buffer = ActivationBuffer::new(x.len(), Forms::of(ty)).expect("memory");
        let (x, _) = activations(&buffer, ty, &x, n_cols);
        let products = |first: usize, past_caches: bool| {
            let mut out = crate::Floats::with_capacity(first + n_tokens * N_ROWS + 64).expect("memory");
            out.set_len(out.capacity());
            out.fill(f32::NAN);
            // SAFETY: the output is a buffer of this thread.
            let rows = unsafe { OutRows::new(out[first..].as_mut_ptr(), N_ROWS, n_tokens, 0..N_ROWS) };
            matrix.mul(0..matrix.n_panels(), &x, &rows.past_caches(past_caches));
            let (before, rest) = out.split_at(first);
            let (products, behind) = rest.split_at(n_tokens * N_ROWS);
            assert!(before.iter().chain(behind).all(|x| x.is_nan()), "{ty} on {isa:?}: written elsewhere");
            products.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        let expected = products(0, false);
        assert!(expected.iter().all(|bits| f32::from_bits(*bits).is_finite()), "{ty} on {isa:?}");
        for first in [0, 3, 16] {
            assert_eq!(products(first, true), expected, "{ty} on {isa:?}, from element {first}");
        }
    }
}

#[test]
fn products_match_the_exact_decode() {
    for isa in isas() {
        for ty in types() {
            let block = ty.row().block_len;
            let cols: &[usize] = if block == 1 { &[1, 3, 33, 130] } else { &[1, 2, 5] };
            for n_cols in cols.iter().map(|n| n * block) {
                for n_tokens in [1, 2, 3, 4, 5, 8, 9, 31, 67] {
                    check(ty, isa, 37, n_cols, n_tokens);
                }
                for n_rows in [1, 4, 7, 8, 16, 17, 48] {
                    check(ty, isa, n_rows, n_cols, 1);
                    check(ty, isa, n_rows, n_cols, 6);
                }
            }
            check(ty, isa, 67, 1024, 1);
            check(ty, isa, 67, 3584, 13);
            // More than share decoded weights: one panel at a time, and pairs with one behind.
            check(ty, isa, 17, 3584, 353);
            check(ty, isa, 67, 2 * block.max(32), 353);
        }
    }
}

/// Extreme codes and activations of one sign: the largest sums that 16-bit accumulators meet.
#[test]
fn extreme_codes_do_not_saturate() {
    /// Enough for tiles.
    const N_TOKENS: usize = 33;
    for isa in isas() {
        for ty in types().filter(|ty| ty.is_quantised()) {
            let geometry = ty.row();
            for fill in [0x00, 0x0f, 0x7f, 0x80, 0xf0, 0xff] {
                let n_cols = 256;
                let mut bytes = vec![fill; 8 * ty.row_bytes(n_cols).expect("whole blocks")];
                let noise = random_blocks(ty, 8 * n_cols, 1.0, &mut Rng::new(3));
                for (block, noise) in bytes.chunks_mut(geometry.block_bytes).zip(noise.chunks(geometry.block_bytes)) {
                    // Scales of two or one bytes lead the fields of every type; they stay finite.
                    for f in fields(ty).iter().filter(|f| f.len <= 2) {
                        block[f.offset..f.offset + f.len].copy_from_slice(&noise[f.offset..f.offset + f.len]);
                    }
                }
                let mut w = vec![f32::NAN; 8 * n_cols];
                ty.decode(&bytes, &mut w);
                let mut source = Buffers::default();
                let weight = source.add("w", ty, &[n_cols, 8], bytes);
                let matrix = Matrix::pack(&weight, &source, isa).expect("memory");
                let x: Vec<f32> = (0..N_TOKENS * n_cols).map(|i| [1.0, -1.0, 0.5][i / n_cols % 3]).collect();
                let buffer = ActivationBuffer::new(x.len(), Forms::of(ty)).expect("memory");
                let (activations, rounded) = activations(&buffer, ty, &x, n_cols);
                let mut out = Poisoned::new(N_TOKENS * 8);
                // SAFETY: the output is a buffer of this thread.
                let rows = unsafe { OutRows::new(out.out().as_mut_ptr(), 8, N_TOKENS, 0..8) };
                matrix.mul(0..matrix.n_panels(), &activations, &rows);
                let want = product(&w, &rounded, n_cols);
                // Relative to the sum of magnitudes: scale and minimum may cancel.
                let magnitude: f64 = w.iter().map(|w| f64::from(w.abs())).sum();
                for (got, want) in out.checked().iter().zip(&want) {
                    let error = (f64::from(*got) - want).abs();
                    assert!(error <= 1e-5 * (1.0 + magnitude), "{ty} on {isa:?}, fill {fill:#x}: {got} for {want}");
                }
            }
        }
    }
}

/// A stack whose rows are cut out of a larger tensor: its matrices lie side by side, as copies to a GPU want them.
#[test]
fn packs_stacks_side_by_side() {
    let (n_cols, mut rng, mut source) = (256, Rng::new(5), Buffers::default());
    let bytes = random_blocks(TensorType::Q4_K, 50 * n_cols, 1.0, &mut rng);
    let mut w = vec![f32::NAN; 50 * n_cols];
    TensorType::Q4_K.decode(&bytes, &mut w);
    let weight = source.add("w", TensorType::Q4_K, &[n_cols, 50], bytes).with_rows([40..50, 3..29]);
    for isa in isas() {
        let matrices = Matrix::pack_stack(&weight, 4, &source, isa).expect("memory");
        assert!(matrices.is_sorted_by(|a, b| a.data.as_ptr_range().end == b.data.as_ptr()));
        let mut row = vec![f32::NAN; n_cols];
        for i in 0..36 {
            matrices[i / 9].decode_row(i % 9, &mut row);
            let from = if i < 10 { 40 + i } else { i - 7 };
            assert_eq!(row, w[from * n_cols..(from + 1) * n_cols], "row {i}");
        }
    }
}

/// Codes, sums and scales of both kinds of blocks.
#[test]
fn rounding_of_activations() {
    let forms = Forms { floats: true, codes_32: true, codes_256: true };
    let buffer = ActivationBuffer::new(2 * SUPER_BLOCK_LEN, forms).expect("memory");
    let view = buffer.view(SUPER_BLOCK_LEN, 1, SUPER_BLOCK_LEN, forms);
    let round = |x: &[f32]| {
        // SAFETY: one thread; the blocks were written.
        unsafe {
            view.write(0, 0, x);
            assert_eq!(std::slice::from_raw_parts(view.floats(), 2), &x[..2]);
            (*view.blocks(), view.block_codes().read().0, *view.super_blocks(), *view.super_codes())
        }
    };
    let mut x = [0.0f32; SUPER_BLOCK_LEN];
    let (block, block_codes, super_block, codes) = round(&x);
    assert_eq!((block.scale, block.sum, block.code_sum, block_codes), (0.0, 0.0, 0, [0; BLOCK_LEN]));
    assert_eq!((super_block.scale, super_block.sums_16, codes.0), (0.0, [0; 16], [0; CODES_LEN]));
    (x[0], x[1], x[2], x[16], x[40]) = (-12.7, 0.25, 0.349, 12.6, 25.4);
    let (block, block_codes, super_block, codes) = round(&x);
    assert_eq!(block_codes[..3], [-127, 2, 3], "nearest, ties to even");
    assert_eq!(block.code_sum, -127 + 2 + 3 + 126);
    assert_eq!(codes.0[..3], [-64, 1, 2]);
    assert_eq!(super_block.sums_16[..3], [-61, 63, 127]);
    assert_eq!(super_block.sums_32[..2], [2, 127]);
    // Smaller than any normal number times 127: must not become NaN.
    let (block, _, super_block, _) = round(&[1e-44; SUPER_BLOCK_LEN]);
    assert!(block.scale.is_finite() && block.sum.is_finite() && super_block.scale.is_finite());
    // A fault upstream stays visible.
    for bad in [f32::NAN, f32::INFINITY] {
        x[7] = bad;
        let (block, _, super_block, _) = round(&x);
        assert!(!block.scale.is_finite() && !super_block.scale.is_finite());
    }
}

/// Memory that cannot be had is an error that says how much was asked for.
#[test]
fn refuses_weights_without_memory() {
    let bytes = usize::MAX / 4;
    assert!(matches!(Storage::zeroed(bytes), Err(Error::WeightMemory { bytes: asked }) if asked == bytes));
    assert_eq!(Storage::zeroed(3).expect("three bytes")[..], [0; 3]);
}

/// What is pinned of a mapping is what is in use of it, in whole pages, and stays that when the mapping has ended.
#[test]
fn mappings_tell_what_is_in_use() {
    let storage = Storage::zeroed(100_000).expect("some bytes");
    Storage::end_mapping();
    let (in_use, bytes) = (storage.mapping(), storage.as_ptr_range());
    assert!(in_use.start <= bytes.start as usize && bytes.end as usize <= in_use.end);
    assert!(in_use.len() < 256 << 20 && in_use.len().is_multiple_of(4096), "{in_use:?}");
    let other = Storage::zeroed(100_000).expect("some bytes");
    assert_ne!(other.mapping().start, in_use.start);
    assert_eq!(storage.mapping(), in_use);
}
