//! Without a GPU: every kernel compiles for every supported architecture, and the hot ones do not spill.

use std::path::PathBuf;
use tandem_cuda::Options;
use tandem_cuda::compile::{Nvrtc, Program};
use tandem_spec::tensor_type::TYPES;
use tandem_spec::testing::shapes::{self, Mix, QWEN35_0_8B, QWEN35_9B, QWEN35_35B, Shape};
use tandem_spec::{KvDtype, TensorType};

/// Turing, Ampere, Ada, Hopper, Blackwell.
const ARCHS: [&str; 7] = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];

pub fn nvrtc() -> Option<Nvrtc> {
    let libs = std::env::var_os("TANDEM_CUDA_LIBS").map(PathBuf::from);
    match Nvrtc::load(libs.as_deref()) {
        Ok(nvrtc) => Some(nvrtc),
        Err(e) => {
            println!("skipped: {e}");
            None
        }
    }
}

/// Compiles all of `programs` for all of `archs` on all cores and returns the compiler's reports.
pub fn compile_all(nvrtc: &Nvrtc, programs: &[Program], archs: &[&str]) -> Vec<(String, String)> {
    let jobs: Vec<(&Program, &str)> = programs.iter().flat_map(|p| archs.iter().map(move |a| (p, *a))).collect();
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
    let types = TYPES.iter().filter(|row| row.ty.is_supported() && row.block_len > 1);
    let programs: Vec<Program> = types.map(|row| tandem_cuda::upload::program(row.ty)).collect();
    let reports = compile_all(&nvrtc, &programs, &ARCHS);
    assert_eq!(reports.len(), programs.len() * ARCHS.len());
    for (what, log) in reports {
        assert!(log.contains("0 bytes spill stores"), "{what}: {log}");
    }
}

#[test]
fn probe_and_exchange_compile_for_every_architecture() {
    let Some(nvrtc) = nvrtc() else { return };
    let programs = [tandem_cuda::probe::program(), tandem_cuda::experts::program()];
    let reports = compile_all(&nvrtc, &programs, &ARCHS);
    assert_eq!(reports.len(), programs.len() * ARCHS.len());
    for (what, log) in reports {
        assert!(spilled(&log) == 0, "{what}: {log}");
    }
}

/// Bytes that the kernels of a report spill: in lines `N bytes stack frame, N bytes spill stores, ...`.
fn spilled(log: &str) -> usize {
    let stores = |line: &str| line.split(" bytes spill stores").next()?.rsplit(' ').next()?.parse::<usize>().ok();
    log.lines().filter(|line| line.contains(" bytes spill stores")).filter_map(stores).sum()
}

#[test]
fn released_models_compile_for_every_architecture_without_spills() {
    let Some(nvrtc) = nvrtc() else { return };
    let programs = |shape: &Shape, mix| {
        let options = Options { n_slots: 1, n_ctx: 4096, n_batch: 512, kv: KvDtype::Bf16 };
        tandem_cuda::programs(&shapes::model(shape, mix).blocks, &options, 132).unwrap()
    };
    // The mixture of experts has every kernel; the dense models differ from it in widths, and compile for one chip.
    let mut reports = compile_all(&nvrtc, &programs(&QWEN35_35B, Mix::Q4KM), &ARCHS);
    reports.extend(compile_all(&nvrtc, &programs(&QWEN35_0_8B, Mix::All(TensorType::Q8_0)), &["sm_90"]));
    reports.extend(compile_all(&nvrtc, &programs(&QWEN35_9B, Mix::Q4KM), &["sm_90"]));
    for (what, log) in reports {
        let short: String = what.chars().filter(|c| *c != '\n').take(60).collect();
        assert_eq!(spilled(&log), 0, "{short}: {log}");
    }
}
