//! Plain Rust, any processor: eight rows, loops that a compiler may turn into vectors.

use super::Simd;
use half::{bf16, f16};
use std::array::from_fn;

/// Eight rows in arrays.
#[derive(Clone, Copy)]
pub(in crate::matrix) struct Portable;

type V = [u8; 32];
type F = [f32; 8];

fn lanes_i32(v: V) -> [i32; 8] {
    from_fn(|r| i32::from_le_bytes([v[4 * r], v[4 * r + 1], v[4 * r + 2], v[4 * r + 3]]))
}

fn from_lanes(lanes: impl Fn(usize) -> i32) -> V {
    let mut v = [0; 32];
    for r in 0..8 {
        v[4 * r..4 * r + 4].copy_from_slice(&lanes(r).to_le_bytes());
    }
    v
}

fn map16(v: V, f: impl Fn(u16) -> u16) -> V {
    let mut out = [0; 32];
    for i in 0..16 {
        out[2 * i..2 * i + 2].copy_from_slice(&f(u16::from_le_bytes([v[2 * i], v[2 * i + 1]])).to_le_bytes());
    }
    out
}

/// Sums of products over groups `groups` of four columns; `w` signed if `SIGNED`.
fn dot_groups<const SIGNED: bool>(w: &[V], x: &[i8]) -> [i32; 8] {
    let mut sums = [0i32; 8];
    for (v, x) in w.iter().zip(x.as_chunks::<4>().0) {
        for r in 0..8 {
            for j in 0..4 {
                let w = if SIGNED { i32::from(v[4 * r + j] as i8) } else { i32::from(v[4 * r + j]) };
                sums[r] += w * i32::from(x[j]);
            }
        }
    }
    sums
}

impl Simd for Portable {
    const LANES: usize = 8;
    type V = V;
    type F = F;
    type Signed = [V; 8];
    type Scale = [i32; 8];
    type Sum = [i32; 8];

    #[inline(always)]
    unsafe fn load(p: *const u8) -> V {
        // SAFETY: the caller's pointer is valid for 32 bytes.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut u8, v: V) {
        // SAFETY: the caller's pointer is valid for 32 bytes.
        unsafe { p.cast::<V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> V {
        // SAFETY: the caller's pointer is valid for 8 bytes.
        let b = unsafe { p.cast::<[u8; 8]>().read_unaligned() };
        from_lanes(|r| i32::from(b[r]))
    }
    #[inline(always)]
    unsafe fn load_u16(p: *const u8) -> V {
        // SAFETY: the caller's pointer is valid for 16 bytes.
        let b = unsafe { p.cast::<[[u8; 2]; 8]>().read_unaligned() };
        from_lanes(|r| i32::from(u16::from_le_bytes(b[r])))
    }
    #[inline(always)]
    unsafe fn splat_u8(x: u8) -> V {
        [x; 32]
    }
    #[inline(always)]
    unsafe fn splat_i32(x: i32) -> V {
        from_lanes(|_| x)
    }
    #[inline(always)]
    unsafe fn and(a: V, b: V) -> V {
        from_fn(|i| a[i] & b[i])
    }
    #[inline(always)]
    unsafe fn or(a: V, b: V) -> V {
        from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn shr16(a: V, n: u32) -> V {
        map16(a, |x| x >> n)
    }
    #[inline(always)]
    unsafe fn shl16(a: V, n: u32) -> V {
        map16(a, |x| x << n)
    }
    #[inline(always)]
    unsafe fn sub_u8(a: V, b: V) -> V {
        from_fn(|i| a[i].wrapping_sub(b[i]))
    }
    #[inline(always)]
    unsafe fn sub_i32(a: V, b: V) -> V {
        let (a, b) = (lanes_i32(a), lanes_i32(b));
        from_lanes(|r| a[r].wrapping_sub(b[r]))
    }
    #[inline(always)]
    unsafe fn lookup(table: &[i8; 16], index: V) -> V {
        from_fn(|i| table[usize::from(index[i] & 15)] as u8)
    }
    #[inline(always)]
    unsafe fn fifth_bits(bits: V, group: usize) -> V {
        let bits = lanes_i32(bits);
        from_fn(|i| ((bits[i / 4] >> (4 * group + i % 4)) as u8 & 1) << 4)
    }
    #[inline(always)]
    unsafe fn to_f32(v: V) -> F {
        lanes_i32(v).map(|x| x as f32)
    }
    #[inline(always)]
    unsafe fn exp2_minus_128(v: V) -> F {
        lanes_i32(v).map(|e| (f64::from(e) - 128.0).exp2() as f32)
    }
    #[inline(always)]
    unsafe fn zero() -> F {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load_f32(p: *const u8) -> F {
        // SAFETY: the caller's pointer is valid for 32 bytes.
        unsafe { p.cast::<F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> F {
        // SAFETY: the caller's pointer is valid for 16 bytes.
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|x| f16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> F {
        // SAFETY: the caller's pointer is valid for 16 bytes.
        unsafe { p.cast::<[u16; 8]>().read_unaligned() }.map(|x| bf16::from_bits(x).to_f32())
    }
    #[inline(always)]
    unsafe fn store_f32(p: *mut f32, v: F) {
        // SAFETY: the caller's pointer is valid for 8 floats.
        unsafe { p.cast::<F>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        from_fn(|r| a[r] + b[r])
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        from_fn(|r| a[r] * b[r])
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        // Not `mul_add`: without the instruction that is a library call.
        from_fn(|r| a[r] * b[r] + c[r])
    }
    #[inline(always)]
    unsafe fn dot<const T: usize>(_: u32, zero: u8, w: &[V; 8], x: [*const i8; T], x_sums: [i32; T]) -> [F; T] {
        from_fn(|t| {
            // SAFETY: the caller's pointers are valid for 32 bytes.
            let dots = dot_groups::<false>(w, unsafe { &*x[t].cast::<[i8; 32]>() });
            dots.map(|s| (s - i32::from(zero) * x_sums[t]) as f32)
        })
    }
    #[inline(always)]
    unsafe fn signed(w: &[V; 8]) -> [V; 8] {
        *w
    }
    #[inline(always)]
    unsafe fn dot_signed<const T: usize>(w: &[V; 8], x: [*const i8; T], _: [i32; T]) -> [F; T] {
        // SAFETY: the caller's pointers are valid for 32 bytes.
        x.map(|x| dot_groups::<true>(w, unsafe { &*x.cast::<[i8; 32]>() }).map(|s| s as f32))
    }
    #[inline(always)]
    unsafe fn scale(p: *const i8) -> [i32; 8] {
        // SAFETY: the caller's pointer is valid for 8 bytes.
        unsafe { p.cast::<[i8; 8]>().read_unaligned() }.map(i32::from)
    }
    #[inline(always)]
    unsafe fn no_sum() -> [i32; 8] {
        [0; 8]
    }
    #[inline(always)]
    unsafe fn sum_to_f32(sum: [i32; 8]) -> F {
        sum.map(|s| s as f32)
    }
    #[inline(always)]
    unsafe fn dot_scaled<const T: usize>(
        _: u32,
        w: &[V; 8],
        scale: [i32; 8],
        x: [*const i8; T],
        sums: &mut [[i32; 8]; T],
    ) {
        for (x, sum) in x.into_iter().zip(sums) {
            // SAFETY: the caller's pointers are valid for 32 bytes.
            let dot = dot_groups::<false>(w, unsafe { &*x.cast::<[i8; 32]>() });
            *sum = from_fn(|r| sum[r] + scale[r] * dot[r]);
        }
    }
    #[inline(always)]
    unsafe fn dot_scaled_half<const T: usize>(
        _: u32,
        w: &[V; 4],
        scale: [i32; 8],
        x: [*const i8; T],
        sums: &mut [[i32; 8]; T],
    ) {
        for (x, sum) in x.into_iter().zip(sums) {
            // SAFETY: the caller's pointers are valid for 16 bytes.
            let dot = dot_groups::<false>(w, unsafe { &*x.cast::<[i8; 16]>() });
            *sum = from_fn(|r| sum[r] + scale[r] * dot[r]);
        }
    }
    #[inline(always)]
    unsafe fn pairs(p: *const i8) -> V {
        // SAFETY: the caller's pointer is valid for 16 bytes.
        let p = unsafe { p.cast::<[[i8; 8]; 2]>().read_unaligned() };
        from_lanes(|r| i32::from(p[0][r]) & 0xffff | i32::from(p[1][r]) << 16)
    }
    #[inline(always)]
    unsafe fn dot_pairs(pairs: &[V], x: *const i16) -> F {
        let mut sums = [0; 8];
        for (i, pair) in pairs.iter().enumerate() {
            // SAFETY: the caller's pointer is valid for `2 * N` numbers.
            let [a, b] = unsafe { x.cast::<[i16; 2]>().add(i).read_unaligned() }.map(i32::from);
            for (sum, pair) in sums.iter_mut().zip(lanes_i32(*pair)) {
                *sum += i32::from(pair as i16) * a + (pair >> 16) * b;
            }
        }
        sums.map(|s| s as f32)
    }
    #[inline(always)]
    unsafe fn prefetch_behind(_: *const u8) {}
}
