//! Without a GPU: every kernel compiles for every supported architecture, and the hot ones do not spill.

use std::path::{Path, PathBuf};
use tandem_cuda::compile::{Nvrtc, Program};
use tandem_cuda::{Compiler, Options, Products};
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
        tandem_cuda::programs(&shapes::model(shape, mix).blocks, &options, 132, Products::Library).unwrap()
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

/// Prompts with 8-bit activations: the types of Q4_K_M files everywhere, all others on one chip that multiplies so.
#[test]
fn int8_prompts_compile_for_every_type_and_architecture_without_spills() {
    let Some(nvrtc) = nvrtc() else { return };
    let options = Options { n_slots: 1, n_ctx: 512, n_batch: 512, kv: KvDtype::Bf16 };
    let programs = |ty| {
        let blocks = shapes::model(&QWEN35_0_8B, Mix::All(ty)).blocks;
        let mut programs = tandem_cuda::programs(&blocks, &options, 132, Products::Int8).unwrap();
        programs.retain(|p| p.defines.iter().any(|(name, _)| *name == "INT8"));
        assert_eq!(programs.len(), 4, "plain and with SwiGLU, some rows and many");
        programs
    };
    let types = TYPES.iter().filter(|row| row.ty.is_supported() && row.block_len > 1).map(|row| row.ty);
    let (of_q4_k_m, others): (Vec<_>, Vec<_>) = types.partition(|ty| matches!(ty, TensorType::Q4_K | TensorType::Q6_K));
    let of = |types: Vec<TensorType>| types.into_iter().flat_map(programs).collect::<Vec<_>>();
    let mut reports = compile_all(&nvrtc, &of(of_q4_k_m), &ARCHS);
    reports.extend(compile_all(&nvrtc, &of(others), &["sm_89"]));
    for (what, log) in reports {
        let (_, defines) = what.rsplit_once("defines").expect("a program prints its defines");
        assert!(log.contains(" bytes spill stores") && spilled(&log) == 0, "{} {defines}: {log}", &what[..6]);
    }
}

#[test]
fn a_gpu_that_the_compiler_does_not_know_is_one_clear_error() {
    let Some(nvrtc) = nvrtc() else { return };
    let Err(error) = nvrtc.compile(&tandem_cuda::probe::program(), "sm_999") else { panic!("it compiled") };
    let error = error.to_string();
    assert!(error.contains("sm_999") && error.contains("does not know this GPU"), "{error}");
}

/// Files in `folder`.
fn entries(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

#[test]
fn cached_cubins_are_used_and_damaged_ones_compiled_anew() {
    let Some(_) = nvrtc() else { return };
    let folder = std::env::temp_dir().join(format!("tandem-cubins-{}", std::process::id()));
    let libs = std::env::var_os("TANDEM_CUDA_LIBS").map(PathBuf::from);
    let compiler = || Compiler::new(libs.as_deref(), Some(folder.clone())).unwrap();
    let programs = [TensorType::Q4_0, TensorType::Q8_0].map(tandem_cuda::upload::program);
    let cubins = |i: usize| compiler().cubins(&programs[i..=i], "sm_90").unwrap().remove(0);

    let first = cubins(0);
    let of_first = entries(&folder);
    assert_eq!(of_first.len(), 1, "{of_first:?}");
    let entry = std::fs::read(&of_first[0]).unwrap();
    assert!(entry.ends_with(&first));
    // Several at once write the same entry.
    let second = std::thread::scope(|scope| {
        let all: Vec<_> = {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| cubins(1))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        };
        assert!(all.iter().all(|cubin| *cubin == all[0]));
        all[0].clone()
    });
    let all = entries(&folder);
    assert!(first != second && all.len() == 2, "temporary files stay: {all:?}");

    // Whatever is whole is taken as it is; what is damaged in any place, or cut, is not, and is replaced.
    let of_second = all.iter().find(|path| **path != of_first[0]).unwrap();
    std::fs::copy(of_second, &of_first[0]).unwrap();
    assert!(cubins(0) == second, "not taken from the cache");
    let flipped = |at: usize| entry.iter().enumerate().map(|(i, b)| if i == at { b ^ 1 } else { *b }).collect();
    for damaged in [flipped(0), flipped(16), flipped(entry.len() - 1), entry[..100].to_vec(), Vec::new()] {
        std::fs::write(&of_first[0], damaged).unwrap();
        assert!(cubins(0) == first && std::fs::read(&of_first[0]).unwrap() == entry);
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
