//! llama.cpp as a runner: one model, one context, one sequence. The only unsafe code of this package.

use crate::Runner;
use anyhow::{Context as _, Result, bail, ensure};
use llama_cpp_sys_2 as sys;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;

/// A loaded model and its context.
pub struct Llama {
    model: *mut sys::llama_model,
    context: *mut sys::llama_context,
    n_vocab: usize,
    n_batch: usize,
}

/// Swallows llama.cpp's log; failures come back as return values.
extern "C" fn no_log(_level: sys::ggml_log_level, _text: *const c_char, _user: *mut c_void) {}

impl Llama {
    /// Loads `path`: every layer on the CPU, flash attention, an f16 KV cache (its defaults), `n_batch` tokens a
    /// batch, weights repacked where llama.cpp knows how if `repack`.
    pub fn open(path: &Path, n_ctx: usize, n_batch: usize, threads: usize, repack: bool) -> Result<Self> {
        let c_path = CString::new(path.as_os_str().as_encoded_bytes()).context("a path without a zero byte")?;
        // SAFETY: plain calls of llama.cpp's C API: the strings and parameters outlive the calls, every
        // returned pointer is checked, and `Drop` frees the context before the model.
        unsafe {
            sys::llama_log_set(Some(no_log), std::ptr::null_mut());
            sys::llama_backend_init();
            let mut params = sys::llama_model_default_params();
            params.n_gpu_layers = 0;
            params.use_extra_bufts = repack;
            let model = sys::llama_model_load_from_file(c_path.as_ptr(), params);
            if model.is_null() {
                bail!("llama.cpp cannot load {}", path.display());
            }
            let mut params = sys::llama_context_default_params();
            params.n_ctx = u32::try_from(n_ctx)?;
            params.n_batch = u32::try_from(n_batch)?;
            params.n_ubatch = u32::try_from(n_batch)?;
            params.n_threads = i32::try_from(threads)?;
            params.n_threads_batch = i32::try_from(threads)?;
            params.flash_attn_type = sys::LLAMA_FLASH_ATTN_TYPE_ENABLED;
            let context = sys::llama_init_from_model(model, params);
            if context.is_null() {
                sys::llama_model_free(model);
                bail!("llama.cpp cannot make a context of {n_ctx} tokens");
            }
            let n_vocab = usize::try_from(sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(model)))?;
            Ok(Self { model, context, n_vocab, n_batch })
        }
    }

    /// What llama.cpp says about its build: instruction sets above all.
    pub fn build() -> String {
        // SAFETY: the function returns a pointer to a static C string.
        unsafe { CStr::from_ptr(sys::llama_print_system_info()) }.to_string_lossy().into_owned()
    }
}

impl Runner for Llama {
    fn clear(&mut self) -> Result<()> {
        // SAFETY: the context is valid until `Drop`.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.context), true) };
        Ok(())
    }

    fn feed(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<()> {
        let mut tokens: Vec<i32> = tokens.iter().map(|t| *t as i32).collect();
        for chunk in tokens.chunks_mut(self.n_batch) {
            // SAFETY: the context is valid until `Drop`; the batch borrows `chunk`, which outlives the call.
            let code = unsafe {
                let batch = sys::llama_batch_get_one(chunk.as_mut_ptr(), i32::try_from(chunk.len())?);
                sys::llama_decode(self.context, batch)
            };
            ensure!(code == 0, "llama_decode returned {code}");
        }
        // SAFETY: after a decode, row -1 holds the `n_vocab` logits of the last token; they are copied before
        // the context is used again.
        unsafe {
            let row = sys::llama_get_logits_ith(self.context, -1);
            ensure!(!row.is_null(), "llama.cpp has no logits");
            logits.clear();
            logits.extend_from_slice(std::slice::from_raw_parts(row, self.n_vocab));
        }
        Ok(())
    }

    fn n_vocab(&self) -> usize {
        self.n_vocab
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        // SAFETY: both pointers came from llama.cpp, were not null, and are freed once.
        unsafe {
            sys::llama_free(self.context);
            sys::llama_model_free(self.model);
        }
    }
}
