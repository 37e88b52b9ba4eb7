//! One allocation of exactly the planned size, handed out in 256-byte aligned ranges. [`Ranges`] is the
//! pure side (sizes for the planner); [`Arena`] the memory. Nothing is freed before the whole arena.

use crate::device::Device;
use crate::error::{During, Error, describe, is_out_of_memory};
use cudarc::driver::{result, sys};
use memmap2::{MmapMut, MmapRaw};
use std::sync::Arc;

/// Every range starts at a multiple of this.
pub const ALIGN: usize = 256;

/// An address in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[repr(transparent)]
pub struct Ptr(pub u64);

impl Ptr {
    /// No memory.
    pub const NULL: Ptr = Ptr(0);

    /// The address `bytes` further on.
    pub fn offset(self, bytes: usize) -> Ptr {
        Ptr(self.0 + bytes as u64)
    }
}

/// A part of an arena that is not yet, or never, allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Range {
    /// Bytes from the start of the arena.
    pub offset: usize,
    /// Length.
    pub bytes: usize,
}

/// Hands out ranges one after the other and counts.
#[derive(Clone, Debug, Default)]
pub struct Ranges {
    end: usize,
}

impl Ranges {
    /// The next `bytes` bytes.
    pub fn take(&mut self, bytes: usize) -> Range {
        let range = Range { offset: self.end, bytes };
        self.end += bytes.next_multiple_of(ALIGN);
        range
    }

    /// Bytes of an arena that holds everything taken so far.
    pub fn total(&self) -> usize {
        self.end
    }
}

/// Device memory.
pub struct Arena {
    device: Arc<Device>,
    base: sys::CUdeviceptr,
    bytes: usize,
}

impl Arena {
    /// Allocates `bytes` bytes for `what`; `planned` is the device's whole plan, for the message.
    ///
    /// # Errors
    /// Out of memory, with the numbers.
    pub fn new(device: &Arc<Device>, what: &'static str, bytes: usize, planned: usize) -> Result<Self, Error> {
        device.bind()?;
        // SAFETY: a plain allocation, freed in `drop`.
        let base = match unsafe { result::malloc_sync(bytes.max(ALIGN)) } {
            Ok(base) => base,
            Err(e) if is_out_of_memory(&e) => {
                let (free, _) = device.memory()?;
                return Err(Error::OutOfMemory { what, ordinal: device.ordinal(), asked: bytes, free, planned });
            }
            Err(e) => return Err(Error::Driver { call: "allocating device memory", reason: describe(e) }),
        };
        assert_eq!(base as usize % ALIGN, 0, "the driver aligns allocations to {ALIGN} bytes");
        Ok(Self { device: device.clone(), base, bytes })
    }

    /// Size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address of a range.
    pub fn ptr(&self, range: Range) -> Ptr {
        assert!(
            range.offset.is_multiple_of(ALIGN) && range.offset + range.bytes <= self.bytes,
            "{range:?} of {}",
            self.bytes
        );
        Ptr(self.base + range.offset as u64)
    }

    /// Sets every byte of a range to `value`, in stream order.
    ///
    /// # Errors
    /// What the driver says.
    pub fn fill(&self, range: Range, value: u8) -> Result<(), Error> {
        self.device.bind()?;
        let ptr = self.ptr(range);
        // SAFETY: `ptr` checked that the range lies inside this allocation.
        unsafe { result::memset_d8_async(ptr.0, value, range.bytes, self.device.stream()) }.during("filling memory")
    }

    /// Copies `data` to the start of a range, in stream order; returns when `data` may be reused.
    ///
    /// # Errors
    /// What the driver says.
    pub fn write<T: Copy>(&self, range: Range, data: &[T]) -> Result<(), Error> {
        self.write_at(range, 0, data)
    }

    /// The same to element `i` of a range that is an array of things of `data`'s size.
    ///
    /// # Errors
    /// What the driver says.
    pub fn write_at<T: Copy>(&self, range: Range, i: usize, data: &[T]) -> Result<(), Error> {
        let at = i * size_of_val(data);
        assert!(at + size_of_val(data) <= range.bytes, "{} bytes at {at} of {range:?}", size_of_val(data));
        self.device.bind()?;
        let ptr = self.ptr(range).offset(at);
        // SAFETY: the destination holds `data`; a copy from pageable memory returns once it is staged, and
        // the stream is waited for in case `data` is pinned.
        unsafe {
            result::memcpy_htod_async(ptr.0, data, self.device.stream()).during("copying to the GPU")?;
        }
        self.device.wait("a copy to the GPU")
    }

    /// Copies the start of a range to `data`, after everything queued before.
    ///
    /// # Errors
    /// What the driver says, or the fault of an earlier kernel.
    pub fn read<T: Copy>(&self, range: Range, data: &mut [T]) -> Result<(), Error> {
        self.queue_read_at(range, 0, data)?;
        self.device.wait("a step")
    }

    /// Queues a copy to `data` of element `i` of a range that is an array of things of `data`'s size. The caller waits
    /// for the stream before it uses or frees `data`.
    ///
    /// # Errors
    /// What the driver says.
    pub(crate) fn queue_read_at<T: Copy>(&self, range: Range, i: usize, data: &mut [T]) -> Result<(), Error> {
        let at = i * size_of_val(data);
        assert!(at + size_of_val(data) <= range.bytes, "{} bytes at {at} of {range:?}", size_of_val(data));
        self.device.bind()?;
        let ptr = self.ptr(range).offset(at);
        // SAFETY: the source holds `data.len()` values of a plain type there.
        unsafe { result::memcpy_dtoh_async(data, ptr.0, self.device.stream()) }.during("copying from the GPU")
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            let _capture = self.device.capture();
            // SAFETY: allocated in `new`; the stream is drained first so that no kernel still uses it.
            unsafe {
                let _ = result::stream::synchronize(self.device.stream());
                let _ = result::free_sync(self.base);
            }
        }
    }
}

/// Pinned host memory that the GPU can address, in huge pages where the system has them: they are pinned many times
/// faster than what the driver allocates.
pub(crate) struct Pinned {
    memory: MmapRaw,
    bytes: usize,
}

impl Pinned {
    /// `bytes` bytes, zero.
    ///
    /// # Errors
    /// No memory, or what the driver says.
    pub fn new(bytes: usize) -> Result<Self, Error> {
        const CALL: &str = "pinning main memory";
        let mapped = MmapMut::map_anon(bytes.max(4));
        let memory = mapped.map_err(|e| Error::Driver { call: CALL, reason: e.to_string() })?;
        // Only a hint: without huge pages it takes longer.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        let memory = MmapRaw::from(memory);
        // SAFETY: the mapping lives until it is given back in `drop`.
        unsafe {
            sys::cuMemHostRegister_v2(memory.as_mut_ptr().cast(), memory.len(), sys::CU_MEMHOSTREGISTER_DEVICEMAP)
        }
        .result()
        .during(CALL)?;
        Ok(Self { memory, bytes })
    }

    /// Size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Address on the host.
    pub fn as_ptr<T>(&self) -> *mut T {
        self.memory.as_mut_ptr().cast()
    }

    /// Address on the GPU.
    ///
    /// # Errors
    /// What the driver says.
    pub fn device_ptr(&self) -> Result<Ptr, Error> {
        let mut ptr = 0;
        // SAFETY: writes one address; the memory was allocated as mapped.
        unsafe { sys::cuMemHostGetDevicePointer_v2(&mut ptr, self.as_ptr(), 0) }
            .result()
            .during("mapping pinned memory")?;
        Ok(Ptr(ptr))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: registered in `new`.
        let _ = unsafe { sys::cuMemHostUnregister(self.as_ptr()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_aligned_and_counted() {
        let mut ranges = Ranges::default();
        let a = ranges.take(1);
        let b = ranges.take(256);
        let c = ranges.take(0);
        assert_eq!((a.offset, b.offset, c.offset, ranges.total()), (0, 256, 512, 512));
    }
}
