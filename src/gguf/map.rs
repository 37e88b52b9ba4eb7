//! Mapped bytes of a file that may shrink under us. Reading a page behind the new end raises SIGBUS; the handler
//! puts a page of zeros there and marks the mapping, so that the reader goes on, reads zeros, and is told by
//! [`Mapping::shrunk`]. Other SIGBUS are left to whoever handled them before. Windows refuses to shorten a mapped
//! file, so nothing is needed there.

use memmap2::Mmap;

/// A read-only mapping of a whole file.
#[derive(Debug)]
pub(super) struct Mapping {
    /// Slot in the handler's table; dropped before the mapping is.
    #[cfg(unix)]
    watch: unix::Watch,
    map: Mmap,
}

impl Mapping {
    /// Maps `file`.
    pub(super) fn new(file: &std::fs::File) -> std::io::Result<Self> {
        // SAFETY: the mapping is read-only and private to us. Another process that writes to the file changes bytes
        // that we only ever read as weights, of which every bit pattern is a number; the header, whose numbers
        // become sizes and positions, is a copy. A file that shrinks is answered by the handler.
        let map = unsafe { Mmap::map(file)? };
        #[cfg(unix)]
        return Ok(Self { watch: unix::Watch::new(&map)?, map });
        #[cfg(not(unix))]
        Ok(Self { map })
    }

    /// The bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Whether a read met the end of a file that has become shorter; it and later ones have read zeros.
    pub(super) fn shrunk(&self) -> bool {
        #[cfg(unix)]
        return self.watch.shrunk();
        #[cfg(not(unix))]
        false
    }
}

#[cfg(unix)]
mod unix {
    use std::io;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

    /// Mappings at one time: several models of the most files that a split set may have.
    const SLOTS: usize = 4096;

    struct Slot {
        /// First address; 0: the slot is free, 1: it is being filled.
        start: AtomicUsize,
        /// Address after the last page.
        end: AtomicUsize,
        shrunk: AtomicBool,
    }

    static TABLE: [Slot; SLOTS] =
        [const { Slot { start: AtomicUsize::new(0), end: AtomicUsize::new(0), shrunk: AtomicBool::new(false) } };
            SLOTS];
    static PAGE: AtomicUsize = AtomicUsize::new(0);
    /// What handled SIGBUS before us, or the error of the installation.
    static BEFORE: OnceLock<Result<libc::sigaction, i32>> = OnceLock::new();

    /// A place in the table for as long as its mapping exists.
    #[derive(Debug)]
    pub(super) struct Watch(usize);

    impl Watch {
        pub(super) fn new(bytes: &[u8]) -> io::Result<Self> {
            BEFORE.get_or_init(install).as_ref().map_err(|code| io::Error::from_raw_os_error(*code))?;
            let index = TABLE.iter().position(|s| s.start.compare_exchange(0, 1, SeqCst, SeqCst).is_ok());
            let index = index.ok_or_else(|| io::Error::other(format!("{SLOTS} files are mapped already")))?;
            let (start, page) = (bytes.as_ptr() as usize, PAGE.load(SeqCst));
            TABLE[index].shrunk.store(false, SeqCst);
            TABLE[index].end.store((start + bytes.len()).next_multiple_of(page), SeqCst);
            TABLE[index].start.store(start, SeqCst);
            Ok(Self(index))
        }

        pub(super) fn shrunk(&self) -> bool {
            TABLE[self.0].shrunk.load(SeqCst)
        }
    }

    impl Drop for Watch {
        fn drop(&mut self) {
            TABLE[self.0].start.store(0, SeqCst);
        }
    }

    fn install() -> Result<libc::sigaction, i32> {
        let failed = || io::Error::last_os_error().raw_os_error().unwrap_or(0);
        // SAFETY: sysconf has no preconditions. `sigaction` is plain data for which zero is a valid value, and both
        // pointers are to live values; the handler does only what a handler may (see there).
        unsafe {
            PAGE.store(libc::sysconf(libc::_SC_PAGESIZE) as usize, SeqCst);
            let mut before: libc::sigaction = std::mem::zeroed();
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut action.sa_mask);
            // The previous action is asked for first: the handler may run as soon as it is installed.
            match libc::sigaction(libc::SIGBUS, &action, &mut before) {
                0 => Ok(before),
                _ => Err(failed()),
            }
        }
    }

    /// Async-signal-safe: atomics, and the system calls mmap and sigaction.
    extern "C" fn on_sigbus(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
        // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO.
        let address = unsafe { (*info).si_addr() } as usize;
        let page = PAGE.load(SeqCst);
        for slot in &TABLE {
            let start = slot.start.load(SeqCst);
            if start > 1 && (start..slot.end.load(SeqCst)).contains(&address) {
                let at = (address & !(page - 1)) as *mut libc::c_void;
                let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                // SAFETY: the page lies in a mapping that we own, which nobody writes and which outlives its slot;
                // after the call it reads as zeros instead of faulting.
                let mapped = unsafe { libc::mmap(at, page, libc::PROT_READ, flags, -1, 0) };
                if mapped != libc::MAP_FAILED {
                    slot.shrunk.store(true, SeqCst);
                    return;
                }
            }
        }
        // Not ours: hand the signal back; the faulting instruction runs again and meets the previous action.
        let before = match BEFORE.get() {
            Some(Ok(before)) => *before,
            // SAFETY: zero is a valid `sigaction`: the default action.
            _ => unsafe { std::mem::zeroed() },
        };
        // SAFETY: `before` is a valid action; a null pointer asks for no old one.
        unsafe { libc::sigaction(libc::SIGBUS, &before, std::ptr::null_mut()) };
    }
}
