//! GPUs: what is there ([`gpus`]), and one opened [`Device`] with its stream. Owns the context and
//! the stream; refuses machines without a driver by an error, never by a panic.

use crate::arena::Ptr;
use crate::error::{During, Error, count_call, describe};
use crate::prompt::Products;
use cudarc::driver::{result, sys};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Oldest CUDA version of a driver that works: kernels are launched through `cuLaunchKernelEx`.
const MIN_DRIVER: i32 = 12000;

/// A GPU as the planner sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuInfo {
    /// Number, as in `CUDA_VISIBLE_DEVICES`' order.
    pub ordinal: usize,
    /// Marketing name.
    pub name: String,
    /// Compute capability `(major, minor)`.
    pub compute_capability: (i32, i32),
    /// Bytes of memory.
    pub total_bytes: usize,
    /// Bytes free now, with the context created.
    pub free_bytes: usize,
    /// Multiprocessors.
    pub n_sms: usize,
    /// Bytes of L2 cache.
    pub l2_bytes: usize,
    /// Bandwidth that clock and bus width promise, in bytes per second; 0 where the driver does not tell.
    pub peak_bytes_per_s: f64,
}

/// Every GPU, or in one line why there is none and what to install.
///
/// # Errors
/// No driver, a driver that is too old or fails, no GPU.
pub fn gpus() -> Result<Vec<GpuInfo>, Error> {
    init()?;
    let n = result::device::get_count().during("counting GPUs")?;
    if n == 0 {
        return Err(Error::NoDevice);
    }
    (0..n as usize).map(|i| Device::open(i)?.info()).collect()
}

/// Loads and initialises the driver; returns its CUDA version.
fn init() -> Result<i32, Error> {
    // SAFETY: only looks whether the driver library can be loaded.
    if !unsafe { sys::is_culib_present() } {
        return Err(Error::NoDriver);
    }
    result::init().map_err(|e| match e.0 {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => Error::NoDevice,
        _ => Error::Driver { call: "initialising the NVIDIA driver", reason: describe(e) },
    })?;
    let mut version = 0;
    // SAFETY: writes one int.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().during("asking the driver's version")?;
    check_driver(version)?;
    Ok(version)
}

/// Refuses drivers whose CUDA version, 1000 * major + 10 * minor, is too old.
fn check_driver(version: i32) -> Result<(), Error> {
    if version >= MIN_DRIVER {
        return Ok(());
    }
    Err(Error::DriverTooOld { found: format!("{}.{}", version / 1000, version % 1000 / 10), needed: "12.0" })
}

thread_local! {
    /// Number of the device whose context is current on this thread; 0 for none.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

/// One GPU with its context and the stream on which every kernel runs.
pub struct Device {
    /// Tells devices apart that were opened one after the other.
    number: u64,
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    n_sms: usize,
    compute_capability: (i32, i32),
    driver_version: i32,
    products: Products,
    capture: Mutex<()>,
}

// SAFETY: driver handles may be used from any thread; `bind` makes the context current there first.
unsafe impl Send for Device {}
// SAFETY: as above; the driver locks its own structures.
unsafe impl Sync for Device {}

impl Device {
    /// Opens GPU `ordinal`: its primary context and a stream.
    ///
    /// # Errors
    /// No driver, no such GPU, a GPU older than Turing (7.5), or what the driver says.
    pub fn open(ordinal: usize) -> Result<Self, Error> {
        let driver_version = init()?;
        let device = result::device::get(ordinal as i32).during("opening a GPU")?;
        // SAFETY: `device` was just returned by the driver.
        let attribute = |a| unsafe { result::device::get_attribute(device, a) }.during("asking a GPU attribute");
        use sys::CUdevice_attribute as A;
        let major = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if (major, minor) < (7, 5) {
            let name = result::device::get_name(device).during("asking a GPU's name")?;
            let reason = "the kernels need 7.5 (Turing) or newer".into();
            return Err(Error::UnsupportedArch { name, major, minor, reason });
        }
        let n_sms = attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        // SAFETY: `device` is valid; the retained context is released in `drop`.
        let context = unsafe { result::primary_ctx::retain(device) }.during("creating a CUDA context")?;
        CURRENT.set(0);
        // SAFETY: `context` is the retained primary context.
        unsafe { result::ctx::set_current(context) }.during("making a CUDA context current")?;
        let stream = match result::stream::create(result::stream::StreamKind::NonBlocking) {
            Ok(stream) => stream,
            Err(e) => {
                // SAFETY: gives back what was retained above.
                let _ = unsafe { result::primary_ctx::release(device) };
                return Err(Error::Driver { call: "creating a stream", reason: describe(e) });
            }
        };
        static OPENED: AtomicU64 = AtomicU64::new(0);
        let number = OPENED.fetch_add(1, Ordering::Relaxed) + 1;
        CURRENT.set(number);
        let (compute_capability, products) = ((major, minor), Products::fastest((major, minor)));
        let capture = Mutex::new(());
        Ok(Self {
            number,
            ordinal,
            device,
            context,
            stream,
            n_sms,
            compute_capability,
            driver_version,
            products,
            capture,
        })
    }

    /// The same with products of prompts computed so, whatever is fastest here: for tests and measurements.
    pub fn with_products(mut self, products: Products) -> Self {
        self.products = products;
        self
    }

    /// Held while the stream is captured, and by who gives memory back, which waits for the stream on any thread.
    pub(crate) fn capture(&self) -> MutexGuard<'_, ()> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the planner needs to know; free memory is read now.
    ///
    /// # Errors
    /// What the driver says.
    pub fn info(&self) -> Result<GpuInfo, Error> {
        self.bind()?;
        let (free_bytes, total_bytes) = self.memory()?;
        use sys::CUdevice_attribute as A;
        let attribute = |a| {
            // SAFETY: `self.device` is a valid device.
            unsafe { result::device::get_attribute(self.device, a) }.during("asking a GPU attribute")
        };
        let khz = attribute(A::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE).unwrap_or(0);
        let bus_bits = attribute(A::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH).unwrap_or(0);
        Ok(GpuInfo {
            ordinal: self.ordinal,
            name: result::device::get_name(self.device).during("asking a GPU's name")?,
            compute_capability: self.compute_capability,
            total_bytes,
            free_bytes,
            n_sms: self.n_sms,
            l2_bytes: attribute(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.max(0) as usize,
            peak_bytes_per_s: 2.0 * f64::from(khz) * 1e3 * f64::from(bus_bits) / 8.0,
        })
    }

    /// Number of the GPU.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// Multiprocessors.
    pub fn n_sms(&self) -> usize {
        self.n_sms
    }

    /// Compute capability `(major, minor)`.
    pub fn compute_capability(&self) -> (i32, i32) {
        self.compute_capability
    }

    /// How the products of prompts are computed here.
    pub fn products(&self) -> Products {
        self.products
    }

    /// Whether a kernel may start before the one ahead of it has ended: Hopper and later, and a driver that
    /// captures it.
    pub(crate) fn can_launch_early(&self) -> bool {
        self.compute_capability >= (9, 0) && self.driver_version >= 12040
    }

    /// The stream of all kernels.
    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Makes the context current on the calling thread. Every public entry of the backend calls it.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) fn bind(&self) -> Result<(), Error> {
        if CURRENT.get() == self.number {
            return Ok(());
        }
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.during("making a CUDA context current")?;
        CURRENT.set(self.number);
        Ok(())
    }

    /// Free and total bytes of the GPU now.
    ///
    /// # Errors
    /// What the driver says.
    pub fn memory(&self) -> Result<(usize, usize), Error> {
        self.bind()?;
        result::mem_get_info().during("asking for free memory")
    }

    /// Waits until the stream is idle; a fault of an earlier kernel surfaces here, as a fault in `block`.
    ///
    /// # Errors
    /// The fault.
    pub(crate) fn wait(&self, block: &str) -> Result<(), Error> {
        self.wait_for(self.stream, block)
    }

    /// Writes `value` to host memory when everything queued before is done.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) fn write_host(&self, to: Ptr, value: u32) -> Result<(), Error> {
        // SAFETY: callers name a word of pinned memory that outlives the stream's work.
        unsafe { sys::cuStreamWriteValue32_v2(self.stream, to.0, value, 0) }.result().during("marking a block")
    }

    /// As [`Device::wait`], for another stream of the device.
    ///
    /// # Errors
    /// The fault.
    pub(crate) fn wait_for(&self, stream: sys::CUstream, block: &str) -> Result<(), Error> {
        count_call();
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(stream) }.map_err(|e| Error::Kernel {
            block: block.to_string(),
            ordinal: self.ordinal,
            reason: describe(e),
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        CURRENT.set(0);
        // SAFETY: both handles are ours and nothing that uses them outlives the device.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_drivers_are_refused_with_both_versions() {
        assert!(check_driver(12000).is_ok() && check_driver(13000).is_ok());
        let error = check_driver(11080).unwrap_err().to_string();
        assert_eq!(error, "the NVIDIA driver supports CUDA 11.8, tandem needs 12.0 or newer (update the driver)");
    }
}
