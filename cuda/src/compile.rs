//! How sources become functions: the only file that knows. A [`Program`] is a `.cu` file and its
//! specialisation; it is compiled by NVRTC for the GPU found, kept on disk as a cubin, and loaded once.
//! Kernels take one `#[repr(C)]` struct; [`Function::launch`] is the only way to start one.

use crate::device::Device;
use crate::error::{During, Error, describe};
use cudarc::driver::{result, sys};
use cudarc::nvrtc::sys as nvrtc;
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Headers that every source may include.
const HEADERS: &[(&str, &str)] = &[
    ("common.cuh", include_str!("common.cuh")),
    ("quant.cuh", include_str!("quant.cuh")),
    ("planes.cuh", include_str!("planes.cuh")),
    ("rows.cuh", include_str!("rows.cuh")),
    ("matrix.cuh", include_str!("matrix.cuh")),
    ("unit.cuh", include_str!("unit.cuh")),
];

/// A `.cu` file with its specialisation.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Program {
    /// File name, for messages.
    pub name: &'static str,
    /// Contents.
    pub text: &'static str,
    /// `-D` options.
    pub defines: Vec<(&'static str, String)>,
}

impl Program {
    /// `text` (file `name`) without options.
    pub fn new(name: &'static str, text: &'static str) -> Self {
        Self { name, text, defines: Vec::new() }
    }

    /// With `-Dname=value`.
    pub fn define(mut self, name: &'static str, value: impl std::fmt::Display) -> Self {
        self.defines.push((name, value.to_string()));
        self
    }

    /// With `-Dname=size_of::<A>()`, which the source compares with the size of its own struct.
    pub fn args<A: Args>(self, name: &'static str) -> Self {
        self.define(name, size_of::<A>())
    }

    /// Options of the compiler, for `arch` such as `sm_90`.
    fn options(&self, arch: &str) -> Vec<String> {
        let mut options = vec![format!("--gpu-architecture={arch}"), "--std=c++17".into(), "--ptxas-options=-v".into()];
        options.extend(self.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        options
    }

    /// Name and options, for messages.
    fn label(&self) -> String {
        let defines: Vec<String> = self.defines.iter().map(|(n, v)| format!("{n}={v}")).collect();
        format!("{} [{}]", self.name, defines.join(" "))
    }
}

/// A compiled program.
pub struct Compiled {
    /// Machine code.
    pub cubin: Vec<u8>,
    /// The compiler's words: registers, stack and spills of each kernel.
    pub log: String,
}

/// The NVRTC library.
pub struct Nvrtc {
    version: (i32, i32),
}

impl Nvrtc {
    /// Loads NVRTC from the folder `libs` (searched three levels deep: the layout of the PyPI packages), or
    /// from the system's library path.
    ///
    /// # Errors
    /// Not found, or older than CUDA 12.
    pub fn load(libs: Option<&Path>) -> Result<Self, Error> {
        if let Some(path) = libs.and_then(|folder| find_library(folder, 5)) {
            // SAFETY: runs NVRTC's initialisers. Kept loaded for the life of the process, so that the lookup by
            // name below finds this copy.
            if let Ok(library) = unsafe { libloading::Library::new(&path) } {
                std::mem::forget(library);
            }
        }
        // SAFETY: only looks whether the library can be loaded.
        if !unsafe { nvrtc::is_culib_present() } {
            return Err(Error::NoNvrtc {
                searched: libs.map(|p| format!(", nor in {}", p.display())).unwrap_or_default(),
            });
        }
        let mut version = (0, 0);
        // SAFETY: writes two ints.
        unsafe { nvrtc::nvrtcVersion(&mut version.0, &mut version.1) };
        if version.0 < 12 {
            return Err(Error::NoNvrtc { searched: format!(": found only {}.{}", version.0, version.1) });
        }
        Ok(Self { version })
    }

    /// Version of the compiler.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles for `arch`, such as `sm_90`.
    ///
    /// # Errors
    /// What the compiler says.
    pub fn compile(&self, program: &Program, arch: &str) -> Result<Compiled, Error> {
        let c = |s: &str| CString::new(s).expect("sources and options hold no zero byte");
        let failed = |log: String| Error::Compile { program: program.label(), arch: arch.into(), log };
        let text = c(program.text);
        let name = c(program.name);
        let header_names: Vec<CString> = HEADERS.iter().map(|(name, _)| c(name)).collect();
        let header_texts: Vec<CString> = HEADERS.iter().map(|(_, text)| c(text)).collect();
        let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
        let mut options = program.options(arch);
        if self.version >= (12, 9) {
            // Its own cache returns code without a report, and outlives ours.
            options.push("--no-cache".into());
        }
        let options: Vec<CString> = options.iter().map(|o| c(o)).collect();
        let mut handle = std::ptr::null_mut();
        // SAFETY: all strings outlive the program, which is destroyed below; sizes are asked before buffers are
        // filled.
        unsafe {
            let created = nvrtc::nvrtcCreateProgram(
                &mut handle,
                text.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as i32,
                pointers(&header_texts).as_ptr(),
                pointers(&header_names).as_ptr(),
            );
            if created != nvrtc::nvrtcResult::NVRTC_SUCCESS {
                return Err(failed(format!("{created:?}")));
            }
            let compiled = nvrtc::nvrtcCompileProgram(handle, options.len() as i32, pointers(&options).as_ptr());
            let mut n = 0;
            nvrtc::nvrtcGetProgramLogSize(handle, &mut n);
            let mut log = vec![0u8; n];
            nvrtc::nvrtcGetProgramLog(handle, log.as_mut_ptr().cast());
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_string();
            let mut cubin = Vec::new();
            if compiled == nvrtc::nvrtcResult::NVRTC_SUCCESS {
                let mut n = 0;
                nvrtc::nvrtcGetCUBINSize(handle, &mut n);
                cubin.resize(n, 0u8);
                nvrtc::nvrtcGetCUBIN(handle, cubin.as_mut_ptr().cast());
            }
            nvrtc::nvrtcDestroyProgram(&mut handle);
            if compiled == nvrtc::nvrtcResult::NVRTC_ERROR_INVALID_OPTION && log.contains("gpu-architecture") {
                let (major, minor) = self.version;
                return Err(failed(format!(
                    "NVRTC {major}.{minor} does not know this GPU (install a newer CUDA toolkit, or run on the CPU)"
                )));
            }
            if cubin.is_empty() {
                return Err(failed(format!("{compiled:?}: {log}")));
            }
            Ok(Compiled { cubin, log })
        }
    }
}

/// The NVRTC library below `folder`, newest name first.
fn find_library(folder: &Path, depth: usize) -> Option<PathBuf> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(folder).ok()?.flatten().map(|e| e.path()).collect();
    names.sort();
    let is_nvrtc = |p: &&PathBuf| {
        let name = p.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("libnvrtc.so") || name.starts_with("nvrtc64")
    };
    if let Some(path) = names.iter().rev().find(is_nvrtc) {
        return Some(path.clone());
    }
    names.iter().filter(|p| depth > 0 && p.is_dir()).find_map(|p| find_library(p, depth - 1))
}

/// 128-bit FNV-1a: names cache entries and finds corrupt ones; nobody attacks it.
fn hash(parts: &[&[u8]]) -> u128 {
    let mut h = 0x6c62272e07bb014262b821756295c58du128;
    for byte in parts.iter().flat_map(|p| p.iter().chain(&[0xff])) {
        h = (h ^ u128::from(*byte)).wrapping_mul(0x0000000001000000000000000000013b);
    }
    h
}

/// NVRTC with a folder of compiled programs.
pub struct Compiler {
    nvrtc: Nvrtc,
    cache: Option<PathBuf>,
}

impl Compiler {
    /// NVRTC from `libs` (see [`Nvrtc::load`]); cubins are kept in the folder `cache`, or nowhere.
    ///
    /// # Errors
    /// No NVRTC.
    pub fn new(libs: Option<&Path>, cache: Option<PathBuf>) -> Result<Self, Error> {
        Ok(Self { nvrtc: Nvrtc::load(libs)?, cache })
    }

    /// Cubins of `programs` for `arch`, compiled in parallel where the cache has none.
    ///
    /// # Errors
    /// The first program that does not compile.
    pub fn cubins(&self, programs: &[Program], arch: &str) -> Result<Vec<Vec<u8>>, Error> {
        let n_threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(programs.len().max(1));
        let next = std::sync::atomic::AtomicUsize::new(0);
        let results = Mutex::new(programs.iter().map(|_| None).collect::<Vec<_>>());
        std::thread::scope(|scope| {
            for _ in 0..n_threads {
                scope.spawn(|| {
                    loop {
                        let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        let Some(program) = programs.get(i) else { return };
                        let cubin = self.cubin(program, arch);
                        results.lock().expect("no thread panics with the lock")[i] = Some(cubin);
                    }
                });
            }
        });
        let results = results.into_inner().expect("threads have ended");
        results.into_iter().map(|cubin| cubin.expect("every index was taken")).collect()
    }

    /// One cubin, from the cache or compiled.
    fn cubin(&self, program: &Program, arch: &str) -> Result<Vec<u8>, Error> {
        let Some(folder) = &self.cache else { return Ok(self.nvrtc.compile(program, arch)?.cubin) };
        let options = program.options(arch).join("\n");
        let version = format!("{:?}", self.nvrtc.version);
        let mut parts = vec![program.text.as_bytes(), options.as_bytes(), version.as_bytes()];
        parts.extend(HEADERS.iter().map(|(_, text)| text.as_bytes()));
        let path = folder.join(format!("{:032x}.cubin", hash(&parts)));
        // An entry is the hash of the cubin, then the cubin; anything else is compiled anew.
        if let Ok(entry) = std::fs::read(&path)
            && let Some((sum, cubin)) = entry.split_at_checked(16)
            && hash(&[cubin]).to_le_bytes() == sum
        {
            return Ok(cubin.to_vec());
        }
        let cubin = self.nvrtc.compile(program, arch)?.cubin;
        // A cache that cannot be written costs time at the next start, nothing else.
        let _ = write_atomically(&path, &[&hash(&[&cubin]).to_le_bytes(), &cubin]);
        Ok(cubin)
    }
}

/// Writes `parts` beside `path` under a name of this process and thread, then renames.
fn write_atomically(path: &Path, parts: &[&[u8]]) -> std::io::Result<()> {
    let folder = path.parent().expect("a file has a folder");
    std::fs::create_dir_all(folder)?;
    let mine = format!("{}.{:?}.tmp", std::process::id(), std::thread::current().id());
    let temporary = path.with_extension(mine);
    std::fs::write(&temporary, parts.concat())?;
    std::fs::rename(&temporary, path)
}

/// A struct that a kernel takes by value as its only parameter.
///
/// # Safety
/// `#[repr(C)]`, without padding that matters, the same fields as the struct of the same name in the `.cu` file.
pub unsafe trait Args: Copy {}

/// Grid, block and dynamic shared memory of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks.
    pub grid: (u32, u32, u32),
    /// Threads per block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

impl Launch {
    /// `blocks` blocks of `threads` threads in one dimension.
    pub fn new(blocks: usize, threads: usize) -> Self {
        Self { grid: (u32::try_from(blocks).expect("grids fit 32 bits"), 1, 1), threads: threads as u32, shared: 0 }
    }

    /// `x` by `y` by `z` blocks.
    pub fn grid(x: usize, y: usize, z: usize, threads: usize) -> Self {
        let n = |v: usize| u32::try_from(v).expect("grids fit 32 bits");
        Self { grid: (n(x), n(y), n(z)), threads: threads as u32, shared: 0 }
    }

    /// With `bytes` of dynamic shared memory.
    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes as u32;
        self
    }
}

/// A kernel of a loaded program.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    handle: sys::CUfunction,
    max_shared: u32,
}

// SAFETY: function handles may be used from any thread whose context is current.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    /// No kernel: for counting programs only.
    pub(crate) fn unresolved() -> Self {
        Self { handle: std::ptr::null_mut(), max_shared: 0 }
    }

    /// Queues the kernel on the device's stream, after everything queued before.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// `args` must be the struct that this kernel takes, every pointer in it must be valid for what the kernel
    /// reads and writes with this grid, until the stream has passed it.
    pub unsafe fn launch<A: Args>(&self, device: &Device, launch: Launch, args: &A) -> Result<(), Error> {
        // SAFETY: as the caller vouches; the kernel starts when its inputs are there.
        unsafe { self.launch_with(device.stream(), launch, args, false) }
    }

    /// As [`Function::launch`], on another stream of the device.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// As [`Function::launch`], with respect to that stream.
    pub(crate) unsafe fn launch_on<A: Args>(
        &self,
        stream: sys::CUstream,
        launch: Launch,
        args: &A,
    ) -> Result<(), Error> {
        // SAFETY: as the caller vouches.
        unsafe { self.launch_with(stream, launch, args, false) }
    }

    /// As [`Function::launch`], but the kernel may start while the one before still runs, where the chip can do that.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// As [`Function::launch`]; every thread of the kernel must call `wait_for_inputs` before it touches memory that
    /// any kernel writes.
    pub unsafe fn launch_early<A: Args>(&self, device: &Device, launch: Launch, args: &A) -> Result<(), Error> {
        // SAFETY: as the caller vouches.
        unsafe { self.launch_with(device.stream(), launch, args, device.can_launch_early()) }
    }

    unsafe fn launch_with<A: Args>(
        &self,
        stream: sys::CUstream,
        launch: Launch,
        args: &A,
        early: bool,
    ) -> Result<(), Error> {
        debug_assert!(launch.shared <= self.max_shared, "{launch:?}");
        if launch.grid.0 == 0 || launch.grid.1 == 0 || launch.grid.2 == 0 {
            return Ok(());
        }
        let mut params = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid.0,
            gridDimY: launch.grid.1,
            gridDimZ: launch.grid.2,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: stream,
            attrs: &mut attribute,
            numAttrs: u32::from(early),
        };
        // SAFETY: the caller vouches for the arguments; the driver copies them before it returns.
        unsafe { sys::cuLaunchKernelEx(&config, self.handle, params.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .during("launching a kernel")
    }
}

struct Module(sys::CUmodule);

// SAFETY: module handles may be used from any thread whose context is current.
unsafe impl Send for Module {}

/// Loaded programs of one device.
pub struct Kernels {
    device: Arc<Device>,
    compiler: Compiler,
    arch: String,
    modules: Mutex<HashMap<Program, Module>>,
}

impl Kernels {
    /// No program yet.
    pub fn new(device: &Arc<Device>, compiler: Compiler) -> Self {
        let (major, minor) = device.compute_capability();
        let arch = format!("sm_{major}{minor}");
        Self { device: device.clone(), compiler, arch, modules: Mutex::default() }
    }

    /// Compiles, in parallel, and loads those of `programs` that are not loaded yet.
    ///
    /// # Errors
    /// The first program that does not compile or load.
    pub fn prepare(&self, programs: impl IntoIterator<Item = Program>) -> Result<(), Error> {
        self.device.bind()?;
        let mut modules = self.modules.lock().expect("no thread panics with the lock");
        let mut missing: Vec<Program> = Vec::new();
        for program in programs {
            if !modules.contains_key(&program) && !missing.contains(&program) {
                missing.push(program);
            }
        }
        let cubins = self.compiler.cubins(&missing, &self.arch)?;
        for (program, cubin) in missing.into_iter().zip(cubins) {
            // SAFETY: a cubin is self-describing and the driver checks it; it copies the image.
            let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }.map_err(|e| Error::Compile {
                program: program.label(),
                arch: self.arch.clone(),
                log: describe(e),
            })?;
            modules.insert(program, Module(module));
        }
        Ok(())
    }

    /// Kernel `entry` of a prepared program, which may use up to `shared` bytes of dynamic shared memory.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Panics
    /// If the program was not prepared or has no such kernel: a bug of ours.
    pub fn function(&self, program: &Program, entry: &str, shared: usize) -> Result<Function, Error> {
        self.device.bind()?;
        let modules = self.modules.lock().expect("no thread panics with the lock");
        let module = modules.get(program).unwrap_or_else(|| panic!("{} was not prepared", program.label()));
        let name = CString::new(entry).expect("no zero byte");
        // SAFETY: the module is loaded and stays so as long as `self`.
        let handle = unsafe { result::module::get_function(module.0, name) }
            .unwrap_or_else(|e| panic!("{} has no kernel {entry}: {}", program.label(), describe(e)));
        let max_shared = shared.max(48 << 10) as u32;
        if shared > 48 << 10 {
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: `handle` is valid.
            unsafe { result::function::set_function_attribute(handle, attribute, shared as i32) }
                .during("raising a kernel's shared memory")?;
        }
        Ok(Function { handle, max_shared })
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.device.bind().is_err() {
            return;
        }
        let _ = self.device.wait("the last step");
        if let Ok(modules) = self.modules.get_mut() {
            for (_, module) in modules.drain() {
                // SAFETY: loaded by `prepare`, unloaded once, after the stream is idle.
                let _ = unsafe { result::module::unload(module.0) };
            }
        }
    }
}
