//! Without a GPU: every kernel compiles for every supported architecture, and the hot ones do not spill.

use std::path::PathBuf;
use tandem_cuda::compile::{Nvrtc, Program};
use tandem_spec::tensor_type::TYPES;

/// Turing, Ampere, Ada, Hopper, Blackwell.
const ARCHS: [&str; 7] = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];

fn nvrtc() -> Option<Nvrtc> {
    let libs = std::env::var_os("TANDEM_CUDA_LIBS").map(PathBuf::from);
    match Nvrtc::load(libs.as_deref()) {
        Ok(nvrtc) => Some(nvrtc),
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}

/// Compiles all of `programs` for all architectures on all cores and returns the compiler's reports.
fn compile_all(nvrtc: &Nvrtc, programs: &[Program]) -> Vec<(String, String)> {
    let jobs: Vec<(&Program, &str)> = programs.iter().flat_map(|p| ARCHS.map(|a| (p, a))).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let reports = std::sync::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while let Some((program, arch)) = jobs.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    let compiled = nvrtc.compile(program, arch).unwrap_or_else(|e| panic!("{e}"));
                    reports.lock().unwrap().push((format!("{arch} {program:?}"), compiled.log));
                }
            });
        }
    });
    reports.into_inner().unwrap()
}

#[test]
fn relayout_compiles_for_every_type_and_architecture() {
    let Some(nvrtc) = nvrtc() else { return };
    let types = TYPES.iter().filter(|row| row.supported && row.block_len > 1);
    let programs: Vec<Program> = types.map(|row| tandem_cuda::upload::program(row.ty)).collect();
    let reports = compile_all(&nvrtc, &programs);
    assert_eq!(reports.len(), programs.len() * ARCHS.len());
    for (what, log) in reports {
        assert!(log.contains("0 bytes spill stores"), "{what}: {log}");
    }
}
