//! Products of 16-bit matrices through cuBLASLt, which on Hopper and later is three times as fast as `gemm.cu`: the
//! instructions that it uses there are out of reach of `mma.sync`. Loaded at the first large prompt; where the library
//! is missing, `gemm.cu` does all products.

use crate::arena::Ptr;
use crate::device::Device;
use crate::error::Error;
use cudarc::cublaslt::{result, sys};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

/// Bytes of device memory that a product may use.
pub(crate) const WORKSPACE_BYTES: usize = 32 << 20;

/// `y [n_rows, ld_y] = x [n_rows, n_in] w^T` or `y +=`, with `w [n_out, n_in]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub n_rows: usize,
    pub n_out: usize,
    pub n_in: usize,
    pub ld_y: usize,
    /// x and w are f16, else bf16.
    pub is_f16: bool,
    /// y is f32, else of the type of x.
    pub y_f32: bool,
    pub add: bool,
}

/// A product of one shape, with the algorithm chosen for it.
struct Product {
    desc: sys::cublasLtMatmulDesc_t,
    w: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algo: sys::cublasLtMatmulAlgo_t,
}

/// The library.
pub(crate) struct Dense {
    handle: sys::cublasLtHandle_t,
    products: Mutex<HashMap<Shape, Product>>,
}

// SAFETY: the handle may be used from any thread; descriptors are used under the lock.
unsafe impl Send for Dense {}
// SAFETY: as above.
unsafe impl Sync for Dense {}

fn failed(e: result::CublasError) -> Error {
    Error::Driver { call: "a product of cuBLASLt", reason: format!("{:?}", e.0) }
}

impl Dense {
    /// The library, or nothing where it is not installed.
    pub fn load() -> Option<Self> {
        // SAFETY: only looks whether the library can be loaded.
        if !unsafe { sys::is_culib_present() } {
            return None;
        }
        let handle = result::create_handle().ok()?;
        Some(Self { handle, products: Mutex::default() })
    }

    fn product(&self, s: &Shape) -> Result<Product, result::CublasError> {
        let half = if s.is_f16 { sys::cudaDataType_t::CUDA_R_16F } else { sys::cudaDataType_t::CUDA_R_16BF };
        let f32 = sys::cudaDataType_t::CUDA_R_32F;
        // Column-major, y^T = w x^T: w is stored as [n_in, n_out] and transposed.
        let desc = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)?;
        let transposed: i32 = 1;
        // SAFETY: an attribute of four bytes.
        unsafe {
            result::set_matmul_desc_attribute(
                desc,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )?;
        }
        let w = result::create_matrix_layout(half, s.n_in as u64, s.n_out as u64, s.n_in as i64)?;
        let x = result::create_matrix_layout(half, s.n_in as u64, s.n_rows as u64, s.n_in as i64)?;
        let y_type = if s.y_f32 { f32 } else { half };
        let y = result::create_matrix_layout(y_type, s.n_out as u64, s.n_rows as u64, s.ld_y as i64)?;
        let preference = result::create_matmul_pref()?;
        let bytes = WORKSPACE_BYTES;
        // SAFETY: an attribute of eight bytes; all descriptors are alive.
        let found = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            )?;
            let found = result::get_matmul_algo_heuristic(self.handle, desc, w, x, y, y, preference);
            result::destroy_matmul_pref(preference)?;
            found?
        };
        Ok(Product { desc, w, x, y, algo: found.algo })
    }

    /// Queues a product. `workspace` holds [`WORKSPACE_BYTES`].
    ///
    /// # Errors
    /// What the library says.
    ///
    /// # Safety
    /// The matrices are where the addresses say, for as long as the stream needs them.
    pub unsafe fn multiply(
        &self,
        device: &Device,
        shape: Shape,
        (w, x, y): (Ptr, Ptr, Ptr),
        workspace: Ptr,
    ) -> Result<(), Error> {
        use std::collections::hash_map::Entry;
        let mut products = self.products.lock().expect("no thread panics with the lock");
        let product = match products.entry(shape) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(self.product(&shape).map_err(failed)?),
        };
        let alpha = 1.0f32;
        let beta = if shape.add { 1.0f32 } else { 0.0 };
        let at = |p: Ptr| p.0 as *const c_void;
        // SAFETY: the caller vouches for the matrices; the descriptors live as long as `self`.
        unsafe {
            result::matmul(
                self.handle,
                product.desc,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                at(w),
                product.w,
                at(x),
                product.x,
                at(y),
                product.y,
                y.0 as *mut c_void,
                product.y,
                &product.algo,
                workspace.0 as *mut c_void,
                WORKSPACE_BYTES,
                device.stream() as sys::cudaStream_t,
            )
        }
        .map_err(failed)
    }
}

impl Drop for Dense {
    fn drop(&mut self) {
        // SAFETY: created in `load` and `product`, destroyed once.
        unsafe {
            if let Ok(products) = self.products.get_mut() {
                for (_, p) in products.drain() {
                    let _ = result::destroy_matrix_layout(p.w);
                    let _ = result::destroy_matrix_layout(p.x);
                    let _ = result::destroy_matrix_layout(p.y);
                    let _ = result::destroy_matmul_desc(p.desc);
                }
            }
            let _ = result::destroy_handle(self.handle);
        }
    }
}
