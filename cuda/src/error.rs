//! What can go wrong on a GPU, one clear line each: what, where, expected, found, what to do.

use cudarc::driver::{result::DriverError, sys::CUresult};
use std::cell::Cell;

/// Failures of the CUDA backend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `libcuda` is not installed.
    #[error("no NVIDIA driver: libcuda was not found (install the NVIDIA driver, or run on the CPU)")]
    NoDriver,
    /// The driver is older than the oldest one that the kernels are built for.
    #[error("the NVIDIA driver supports CUDA {found}, tandem needs {needed} or newer (update the driver)")]
    DriverTooOld {
        /// CUDA version of the driver, `major.minor`.
        found: String,
        /// Oldest version that works.
        needed: &'static str,
    },
    /// The driver sees no GPU.
    #[error("the NVIDIA driver sees no GPU (check nvidia-smi and CUDA_VISIBLE_DEVICES)")]
    NoDevice,
    /// The NVRTC library is missing.
    #[error(
        "no CUDA run-time compiler: libnvrtc (CUDA 12 or 13) was not found{searched} (install the CUDA toolkit, or run \
         scripts/nvrtc.sh FOLDER, which fetches it from PyPI, and set TANDEM_CUDA_LIBS=FOLDER)"
    )]
    NoNvrtc {
        /// Where it was searched besides the system's library path; empty, or ` in PATH`.
        searched: String,
    },
    /// The compiler does not know the GPU.
    #[error("{name}: compute capability {major}.{minor} is not supported ({reason})")]
    UnsupportedArch {
        /// Name of the GPU.
        name: String,
        /// Compute capability.
        major: i32,
        /// Compute capability.
        minor: i32,
        /// Which side does not know it.
        reason: String,
    },
    /// An allocation failed.
    #[error(
        "{what} on GPU {ordinal}: asked for {asked} bytes, {free} are free, {planned} were planned for this device \
         (close other programs on the GPU, or plan with less: --vram)"
    )]
    OutOfMemory {
        /// What the memory is for.
        what: &'static str,
        /// GPU number.
        ordinal: usize,
        /// Bytes of this allocation.
        asked: usize,
        /// Bytes that the driver reports as free.
        free: usize,
        /// Bytes that the plan gave this device.
        planned: usize,
    },
    /// A kernel failed while it ran.
    #[error("kernel fault in {block} on GPU {ordinal}: {reason}")]
    Kernel {
        /// Block, or `step` where only the whole step is known.
        block: String,
        /// GPU number.
        ordinal: usize,
        /// The driver's words.
        reason: String,
    },
    /// A kernel source did not compile: a bug of ours, or a compiler that is too old.
    #[error("compiling {program} for {arch}: {log}")]
    Compile {
        /// Source and options.
        program: String,
        /// Architecture, such as `sm_90`.
        arch: String,
        /// The compiler's words.
        log: String,
    },
    /// The CPU's part of a step failed or did not come.
    #[error("the CPU workers did not answer the GPU within 30 seconds, or failed: the step was ended")]
    NoAnswer,
    /// Any other driver call.
    #[error("{call}: {reason}")]
    Driver {
        /// What was attempted.
        call: &'static str,
        /// The driver's words.
        reason: String,
    },
    /// The model or the wishes cannot be served by this backend.
    #[error("{0}")]
    Unsupported(String),
    /// A batch that the state cannot take.
    #[error("{0}")]
    Batch(String),
    /// Logits that no token can be chosen from: the computation before is wrong.
    #[error("the logits of slot {slot} are unusable: one is not a number or infinite, or none is finite")]
    Logits {
        /// Slot of the sequence.
        slot: usize,
    },
}

/// The driver's name and sentence for an error.
pub(crate) fn describe(e: DriverError) -> String {
    let text =
        |s: Result<&std::ffi::CStr, DriverError>| s.map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    format!("{} ({})", text(e.error_string()), text(e.error_name()))
}

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

/// Driver calls that this thread has made, but for those that free something: shows what a step costs the host.
pub fn driver_calls() -> u64 {
    CALLS.get()
}

/// Every place that calls the driver passes here, most of them through [`During`].
pub(crate) fn count_call() {
    CALLS.set(CALLS.get() + 1);
}

/// Adds what was attempted to a driver error.
pub(crate) trait During<T> {
    /// `call`: what was attempted.
    fn during(self, call: &'static str) -> Result<T, Error>;
}

impl<T> During<T> for Result<T, DriverError> {
    fn during(self, call: &'static str) -> Result<T, Error> {
        count_call();
        self.map_err(|e| Error::Driver { call, reason: describe(e) })
    }
}

/// Whether an error is the driver's out-of-memory.
pub(crate) fn is_out_of_memory(e: &DriverError) -> bool {
    e.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_what_is_needed_to_act() {
        let memory = Error::OutOfMemory { what: "weights", ordinal: 1, asked: 300, free: 200, planned: 400 };
        let fault = Error::Kernel { block: "a step".into(), ordinal: 0, reason: "an illegal address".into() };
        let arch = Error::UnsupportedArch { name: "Tesla V100".into(), major: 7, minor: 0, reason: "needs 7.5".into() };
        for (error, parts) in [
            (&memory, &["weights", "GPU 1", "300", "200 are free", "400 were planned", "--vram"][..]),
            (&fault, &["a step", "GPU 0", "an illegal address"]),
            (&arch, &["Tesla V100", "7.0", "needs 7.5"]),
            (&Error::NoDriver, &["libcuda", "install"]),
            (&Error::NoDevice, &["nvidia-smi"]),
            (
                &Error::NoNvrtc { searched: ", nor in /x".into() },
                &["libnvrtc", "nor in /x", "scripts/nvrtc.sh", "TANDEM_CUDA_LIBS"],
            ),
        ] {
            let line = error.to_string();
            assert!(parts.iter().all(|part| line.contains(part)) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn only_the_code_for_memory_counts_as_out_of_memory() {
        assert!(is_out_of_memory(&DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)));
        assert!(!is_out_of_memory(&DriverError(CUresult::CUDA_ERROR_ILLEGAL_ADDRESS)));
    }
}
