//! Decoding of one block of each tensor type, as ggml defines the formats. A decoder takes the
//! bytes of a block and writes its values; every value is computed exactly in f64 (products of a half
//! and small integers) and rounded once to f32. Lengths are checked by [`crate::TensorType::decode`].
//!
//! In the comments `lo` and `hi` are the two halves of a byte, and byte ranges are within the block.

/// Writes the values of one block: `block_bytes` bytes in, `block_len` values out.
pub type BlockDecoder = fn(&[u8], &mut [f32]);

/// The 16 values of an IQ4 code.
pub const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The 16 values of an E2M1 code, doubled so that they are integers.
pub const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Little-endian half at byte `at`.
fn half(b: &[u8], at: usize) -> f64 {
    half::f16::from_le_bytes([b[at], b[at + 1]]).to_f64()
}

/// Writes `f(low nibble of qs[j])` at `j` and `f(high nibble)` at `j + qs.len()`; `f` also gets the index.
fn nibbles(qs: &[u8], x: &mut [f32], f: impl Fn(usize, u8) -> f64) {
    let (low, high) = x.split_at_mut(qs.len());
    for (j, q) in qs.iter().enumerate() {
        low[j] = f(j, q & 15) as f32;
        high[j] = f(j + qs.len(), q >> 4) as f32;
    }
}

pub(crate) fn f32(b: &[u8], x: &mut [f32]) {
    x[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
}

pub(crate) fn f16(b: &[u8], x: &mut [f32]) {
    x[0] = half(b, 0) as f32;
}

pub(crate) fn bf16(b: &[u8], x: &mut [f32]) {
    x[0] = half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
}

/// `d[0:2] qs[2:18]`.
pub(crate) fn q4_0(b: &[u8], x: &mut [f32]) {
    let d = half(b, 0);
    nibbles(&b[2..18], x, |_, q| d * (f64::from(q) - 8.0));
}

/// `d[0:2] m[2:4] qs[4:20]`.
pub(crate) fn q4_1(b: &[u8], x: &mut [f32]) {
    let (d, m) = (half(b, 0), half(b, 2));
    nibbles(&b[4..20], x, |_, q| d * f64::from(q) + m);
}

/// The fifth bits of 32 codes, already shifted to their place.
fn fifth_bits(b: &[u8]) -> impl Fn(usize) -> u8 {
    let bits = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    move |j| ((bits >> j & 1) << 4) as u8
}

/// `d[0:2] qh[2:6] qs[6:22]`.
pub(crate) fn q5_0(b: &[u8], x: &mut [f32]) {
    let (d, high) = (half(b, 0), fifth_bits(&b[2..6]));
    nibbles(&b[6..22], x, |j, q| d * (f64::from(q | high(j)) - 16.0));
}

/// `d[0:2] m[2:4] qh[4:8] qs[8:24]`.
pub(crate) fn q5_1(b: &[u8], x: &mut [f32]) {
    let (d, m, high) = (half(b, 0), half(b, 2), fifth_bits(&b[4..8]));
    nibbles(&b[8..24], x, |j, q| d * f64::from(q | high(j)) + m);
}

/// `d[0:2] qs[2:34]` (i8).
pub(crate) fn q8_0(b: &[u8], x: &mut [f32]) {
    let d = half(b, 0);
    for (x, q) in x.iter_mut().zip(&b[2..34]) {
        *x = (d * f64::from(*q as i8)) as f32;
    }
}

/// `scales[0:16] qs[16:80] d[80:82] dmin[82:84]`; 16 sub-blocks of 16, scale in `lo`, minimum in `hi`.
pub(crate) fn q2_k(b: &[u8], x: &mut [f32]) {
    let (d, dmin) = (half(b, 80), half(b, 82));
    for (e, x) in x.iter_mut().enumerate() {
        let (n, s, l) = (e / 128, e / 32 % 4, e % 32);
        let q = b[16 + 32 * n + l] >> (2 * s) & 3;
        let c = b[e / 16];
        *x = (d * f64::from(c & 15) * f64::from(q) - dmin * f64::from(c >> 4)) as f32;
    }
}

/// `hmask[0:32] qs[32:96] scales[96:108] d[108:110]`; a clear bit of `hmask` subtracts 4.
pub(crate) fn q3_k(b: &[u8], x: &mut [f32]) {
    let d = half(b, 108);
    let scale = q3_k_scales(&b[96..108]);
    for (e, x) in x.iter_mut().enumerate() {
        let (n, s, l) = (e / 128, e / 32 % 4, e % 32);
        let low = (b[32 + 32 * n + l] >> (2 * s) & 3) as i8;
        let q = if b[l] >> (4 * n + s) & 1 == 1 { low } else { low - 4 };
        *x = (d * f64::from(scale[e / 16]) * f64::from(q)) as f32;
    }
}

/// The 16 signed six-bit scales of a Q3_K block from their 12 bytes.
pub fn q3_k_scales(b: &[u8]) -> [i8; 16] {
    std::array::from_fn(|k| {
        let low = if k < 8 { b[k] & 15 } else { b[k - 8] >> 4 };
        let high = b[8 + k % 4] >> (2 * (k / 4)) & 3;
        (low | high << 4) as i8 - 32
    })
}

/// The eight six-bit (scale, minimum) pairs of a Q4_K or Q5_K block from their 12 bytes.
pub fn q4_k_scales(b: &[u8]) -> [(u8, u8); 8] {
    std::array::from_fn(|k| {
        if k < 4 {
            (b[k] & 63, b[k + 4] & 63)
        } else {
            (b[k + 4] & 15 | b[k - 4] >> 6 << 4, b[k + 4] >> 4 | b[k] >> 6 << 4)
        }
    })
}

/// Q4_K and Q5_K: sub-blocks of 32, pairs of them share 32 bytes of nibbles; `high(k, l)` is the fifth bit
/// of element `l` of sub-block `k`, in its place.
fn q45_k(b: &[u8], qs: &[u8], x: &mut [f32], high: impl Fn(usize, usize) -> u8) {
    let (d, dmin) = (half(b, 0), half(b, 2));
    let scales = q4_k_scales(&b[4..16]);
    for (p, (qs, x)) in qs.chunks_exact(32).zip(x.chunks_exact_mut(64)).enumerate() {
        nibbles(qs, x, |j, q| {
            let k = 2 * p + j / 32;
            let (scale, min) = scales[k];
            d * f64::from(scale) * f64::from(q | high(k, j % 32)) - dmin * f64::from(min)
        });
    }
}

/// `d[0:2] dmin[2:4] scales[4:16] qs[16:144]`.
pub(crate) fn q4_k(b: &[u8], x: &mut [f32]) {
    q45_k(b, &b[16..144], x, |_, _| 0);
}

/// `d[0:2] dmin[2:4] scales[4:16] qh[16:48] qs[48:176]`.
pub(crate) fn q5_k(b: &[u8], x: &mut [f32]) {
    q45_k(b, &b[48..176], x, |k, l| (b[16 + l] >> k & 1) << 4);
}

/// `ql[0:128] qh[128:192] scales[192:208] (i8) d[208:210]`.
pub(crate) fn q6_k(b: &[u8], x: &mut [f32]) {
    let d = half(b, 208);
    for (e, x) in x.iter_mut().enumerate() {
        let (n, s, l) = (e / 128, e / 32 % 4, e % 32);
        let low = b[64 * n + 32 * (s % 2) + l] >> (4 * (s / 2)) & 15;
        let high = b[128 + 32 * n + l] >> (2 * s) & 3;
        let q = f64::from(low | high << 4) - 32.0;
        *x = (d * f64::from(b[192 + e / 16] as i8) * q) as f32;
    }
}

/// `d[0:2] qs[2:18]`.
pub(crate) fn iq4_nl(b: &[u8], x: &mut [f32]) {
    let d = half(b, 0);
    nibbles(&b[2..18], x, |_, q| d * f64::from(IQ4_VALUES[usize::from(q)]));
}

/// `d[0:2] scales_h[2:4] scales_l[4:8] qs[8:136]`; 8 sub-blocks of 32, each with its 16 bytes of nibbles.
pub(crate) fn iq4_xs(b: &[u8], x: &mut [f32]) {
    let d = half(b, 0);
    let scales = iq4_xs_scales(&b[2..8]);
    for ((scale, qs), x) in scales.iter().zip(b[8..136].chunks_exact(16)).zip(x.chunks_exact_mut(32)) {
        nibbles(qs, x, |_, q| d * f64::from(*scale) * f64::from(IQ4_VALUES[usize::from(q)]));
    }
}

/// The eight signed six-bit scales of an IQ4_XS block from `scales_h` (2 bytes) and `scales_l` (4 bytes).
pub fn iq4_xs_scales(b: &[u8]) -> [i8; 8] {
    let high = u16::from_le_bytes([b[0], b[1]]);
    std::array::from_fn(|k| {
        let low = b[2 + k / 2] >> (4 * (k % 2)) & 15;
        (low | ((high >> (2 * k) & 3) << 4) as u8) as i8 - 32
    })
}

/// `e[0:1] qs[1:17]`; the scale is `2^(e - 127)`, halved for the doubled codes.
pub(crate) fn mxfp4(b: &[u8], x: &mut [f32]) {
    let d = f64::from(i16::from(b[0]) - 128).exp2();
    nibbles(&b[1..17], x, |_, q| d * f64::from(E2M1_DOUBLED[usize::from(q)]));
}
