//! The binary as a person uses it: answers on standard output, one clear line on standard error for every
//! mistake, exit code 2 for usage, 130 for Ctrl-C and 1 for the rest.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Runs `tandem` with `args` and environment `vars`, standard input empty. Facts about the machine are cached
/// in the build's own folder.
fn tandem(args: &[&str], vars: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null());
    command.args(args).envs(vars.iter().copied()).output().expect("the binary starts")
}

/// Fails with `code`, prints nothing on standard output and an error that contains every one of `parts`.
fn assert_refused(args: &[&str], vars: &[(&str, &str)], code: i32, parts: &[&str]) {
    let output = tandem(args, vars);
    let stderr = String::from_utf8(output.stderr).expect("messages are UTF-8");
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?} printed {:?}", String::from_utf8_lossy(&output.stdout));
    let error = stderr.lines().find(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("{args:?}: {stderr}"));
    assert_eq!(stderr.matches("error: ").count(), 1, "{args:?}: {stderr}");
    for part in parts {
        assert!(error.contains(part), "{args:?}: `{part}` is not in `{error}`");
    }
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
}

fn scratch(name: &str, bytes: &[u8]) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, bytes).expect("the build's folder can be written");
    path
}

fn golden(name: &str) -> String {
    format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn bad_files_are_refused_with_one_line() {
    let whole = std::fs::read(golden("qwen35-f32.gguf")).unwrap();
    let half = scratch("half.gguf", &whole[..whole.len() / 2]);
    let empty = scratch("empty.gguf", b"");
    let foreign = scratch("foreign.gguf", b"PK\x03\x04 this is a zip file, not a model, and long enough for a header");
    let mut other = whole.clone();
    let at = other.windows(6).position(|w| w == b"qwen35").expect("the architecture's name");
    other[at..at + 6].copy_from_slice(b"gemma9");
    let other = scratch("other.gguf", &other);
    for (path, parts) in [
        (Path::new("no/such/model.gguf"), &["no/such/model.gguf"][..]),
        (&half, &["half.gguf"]),
        (&empty, &["empty.gguf"]),
        (&foreign, &["foreign.gguf", "GGUF"]),
        (&other, &["gemma9", "qwen35moe", "llama"]),
    ] {
        for command in [&["run", "-p", "Hello"][..], &["logits", "--tokens", "1"], &["bench"]] {
            let path = path.to_str().unwrap();
            assert_refused(&[command, &[path]].concat(), &[], 1, parts);
        }
    }
}

#[test]
fn wrong_usage_is_refused_with_code_2() {
    let model = golden("qwen35-f32.gguf");
    let pure = concat!(env!("CARGO_TARGET_TMPDIR"), "/pure.svg");
    assert_refused(&["run", "--no-such-flag"], &[], 2, &["--no-such-flag"]);
    assert_eq!(tandem(&[], &[]).status.code(), Some(2), "no command at all");
    assert_refused(&["no-such-command"], &[], 2, &["no-such-command"]);
    assert_refused(&["run", "-p", "x"], &[("TANDEM_KV_DTYPE", "int3")], 2, &["int3", "bf16"]);
    assert_refused(&["run", "-p", "x"], &[("TANDEM_CPU_ISA", "mmx")], 2, &["mmx", "portable"]);
    assert_refused(&["run", "-p", "x"], &[("TANDEM_THREADS", "many")], 2, &["many"]);
    assert_refused(&["run", "-p", "x"], &[("TANDEM_VRAM", "12Q")], 2, &["12Q"]);
    assert_refused(&["run", "-p", "x", "--temp", "-1"], &[], 2, &["temp"]);
    assert_refused(&["run", "-p", "x", "--think", "on"], &[], 2, &["--think"]);
    assert_refused(&["run", "--no-template", "-p", ""], &[], 2, &["empty"]);
    assert_refused(&["bench", "--trace", "step.png"], &[], 2, &["step.png", ".svg", ".html"]);
    assert_refused(&["bench", "--vram", "0", "-n", "1", "--trace", pure], &[], 2, &["--trace", "CPU"]);
    assert_refused(&["logits", &model, "--tokens", "1,288"], &[], 2, &["288", "287"]);
    assert_refused(&["logits", &model, "--tokens", "1,2,3", "--ctx", "2"], &[], 2, &["3", "2"]);
}

/// A trace that cannot be written is refused before anything is planned or loaded.
#[test]
fn an_unwritable_trace_is_refused_first() {
    let path = "no/such/folder/step.svg";
    assert_refused(&["bench", "--trace", path], &[], 1, &[path, "cannot write"]);
    let output = tandem(&["bench", "--trace", path], &[]);
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1, "no plan was made");
}

/// Facts about a machine that are no facts, or those of another version, are refused with the name of their file and
/// what is wrong.
#[test]
fn wrong_facts_are_refused() {
    let probed = tandem(&["probe", "--json"], &[]);
    let mut facts: serde_json::Value = serde_json::from_slice(&probed.stdout).unwrap();
    facts["host"]["read"] = serde_json::json!([]);
    let refuse = |name: &str, facts: &serde_json::Value, says: &[&str]| {
        let path = scratch(name, facts.to_string().as_bytes());
        let path = path.to_str().unwrap();
        assert_refused(&["plan", &golden("qwen35-f32.gguf"), "--machine", path], &[], 1, &[&[path], says].concat());
    };
    refuse("no-rates.json", &facts, &["`read`"]);
    facts["host"].as_object_mut().unwrap().remove("read");
    refuse("no-read.json", &facts, &["`read`", "`tandem probe --json`"]);
}

/// Options that contradict each other are refused, where both come from the command line or both from the
/// environment; else the environment yields.
#[test]
fn contradicting_options_are_refused_unless_one_is_of_the_environment() {
    let model = golden("qwen35-f32.gguf");
    let made = tandem(&["plan", &model, "--machine", "ddr4-16gb", "--threads", "2", "--json"], &[]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let saved = scratch("saved-plan.json", &made.stdout);
    let saved = saved.to_str().unwrap();
    let with_plan = ["run", &model, "-p", "x", "-n", "1", "--plan", saved];
    for option in [
        ["--ctx", "64"],
        ["--kv-dtype", "f32"],
        ["--batch", "8"],
        ["--threads", "1"],
        ["--vram", "0"],
        ["--ram", "1G"],
        ["--place", "*=cpu"],
        ["--gpu-layers", "0"],
        ["--machine", "ddr4-16gb"],
        ["--cpu-isa", "portable"],
    ] {
        assert_refused(&[&with_plan[..], &option].concat(), &[], 2, &["--plan", option[0]]);
    }
    let variables = [("TANDEM_PLAN", saved), ("TANDEM_CTX", "64")];
    assert_refused(&["plan", &model], &variables, 2, &["TANDEM_PLAN", "TANDEM_CTX"]);
    assert_refused(&["plan", &model, "--plan", saved, "--prompt", "9"], &[], 2, &["--plan", "--prompt"]);
    assert_refused(&["plan", &model, "--json", "--why"], &[], 2, &["--json", "--why"]);
    assert_refused(&["run", "--system", "x", "--no-template", "-p", "x"], &[], 2, &["--system", "--no-template"]);

    let ran = tandem(&with_plan, &[("TANDEM_CTX", "64")]);
    let words = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success() && !words.contains("ctx 64") && words.contains("bytes as planned"), "{words}");
    let planned = tandem(&["plan", &model, "--machine", "ddr4-16gb", "--ctx", "64"], &variables[..1]);
    assert!(String::from_utf8_lossy(&planned.stdout).contains("context 64 x 1 slot"), "the saved plan yields");
    let plain = ["run", "--no-template", "-p", "Once", "-n", "1"];
    assert!(tandem(&plain, &[("TANDEM_SYSTEM", "Be brief.")]).status.success(), "the system message yields");
}

/// Where there is no driver the CPU does it and tandem says why; who asks for a GPU, or for none, gets no other answer.
#[test]
fn without_a_driver_the_cpu_runs_unless_a_gpu_was_asked_for() {
    const NO_DRIVER: &str = "no NVIDIA driver: libcuda was not found";
    if !String::from_utf8_lossy(&tandem(&["probe"], &[]).stdout).contains(NO_DRIVER) {
        return println!("skipped: there is a driver");
    }
    let model = golden("qwen35-f32.gguf");
    let run = ["run", &model, "-p", "x", "-n", "1"];
    let words = |more: &[&str]| {
        let ran = tandem(&[&run[..], more].concat(), &[]);
        assert!(ran.status.success(), "{more:?}: {}", String::from_utf8_lossy(&ran.stderr));
        String::from_utf8_lossy(&ran.stderr).into_owned()
    };
    let fallen_back = words(&[]);
    assert!(fallen_back.contains(NO_DRIVER) && fallen_back.contains("; running on the CPU"), "{fallen_back}");
    for nothing in [["--vram", "0"], ["--gpu-layers", "0"]] {
        assert!(!words(&nothing).contains("driver"), "{nothing:?}");
    }
    for asked in [["--vram", "8G"], ["--gpu-layers", "1"], ["--place", "*=cuda0"]] {
        assert_refused(&[&run[..], &asked].concat(), &[], 1, &[NO_DRIVER]);
    }
}

#[test]
fn a_template_that_fails_is_reported_with_its_file() {
    let mut model = std::fs::read(golden("qwen35-f32.gguf")).unwrap();
    let at = model.windows(9).position(|w| w == b"m.content").expect("the template prints the content");
    model[at..at + 9].copy_from_slice(b"m.x.y.z.w");
    let model = scratch("template-fails.gguf", &model);
    let parts = ["template-fails.gguf: the chat template can't be used: line 2: "];
    assert_refused(&["run", model.to_str().unwrap(), "-p", "x"], &[], 1, &parts);
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_ends_an_answer_with_code_130() {
    use std::io::Read;
    use std::os::fd::AsRawFd;
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR")).stdin(Stdio::null());
    command.args(["run", "--no-template", "-p", "Once upon a time", "--temp", "0", "--json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts");
    let mut stdout = child.stdout.take().expect("piped");
    // A story is longer than a page: it waits in the middle until the pipe is read on.
    // SAFETY: calls without pointers, on a pipe that is open and a child that has not been waited for.
    let interrupted = unsafe {
        libc::fcntl(stdout.as_raw_fd(), libc::F_SETPIPE_SZ, 4096);
        stdout.read_exact(&mut [0]).expect("a first token");
        libc::kill(child.id() as libc::pid_t, libc::SIGINT)
    };
    assert_eq!(interrupted, 0);
    std::thread::sleep(std::time::Duration::from_millis(200)); // for the thread that handles the signal
    let mut text = String::new();
    stdout.read_to_string(&mut text).expect("complete UTF-8");
    let output = child.wait_with_output().expect("the binary ends");
    let stderr = String::from_utf8(output.stderr).expect("messages are UTF-8");
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(!stderr.contains("error: "), "{stderr}");
    let summary: serde_json::Value = serde_json::from_str(text.lines().last().expect("a summary")).unwrap();
    assert_eq!(summary["stop"], "interrupted");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_computed() {
    assert_refused(&["run", "-p", "Tell me a story.", "--ctx", "8"], &[], 1, &["8", "--ctx"]);
    assert_refused(&["run", "-p", "x", "--ctx", "4000000000"], &[], 1, &[]);
    assert_refused(&["run", "-p", "x", "--ram", "1M"], &[], 1, &[]);
}

#[test]
fn answers_go_to_standard_output() {
    let text = |args: &[&str]| {
        let output = tandem(args, &[]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("complete UTF-8")
    };
    let story = text(&["run", "-p", "Tell me a story about an owl named Ravi.", "--temp", "0", "-n", "40"]);
    assert!(story.contains("owl") && story.contains("Ravi"), "{story}");

    let lines = text(&["run", "-p", "Tell me a story about an owl named Ravi.", "--temp", "0", "-n", "12", "--json"]);
    let lines: Vec<serde_json::Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let pieces: String = lines[..12].iter().map(|line| line["text"].as_str().unwrap()).collect();
    assert!(story.starts_with(&pieces), "{pieces:?} does not begin {story:?}");
    assert_eq!((lines.len(), &lines[12]["stop"]), (13, &serde_json::json!("length")));
    assert_eq!(lines[12]["text"], pieces);

    let stopped = text(&["run", "-p", "Tell me a story about an owl named Ravi.", "--temp", "0", "--stop", "Ravi"]);
    assert!(story.starts_with(stopped.trim_end()) && !stopped.contains("Ravi"), "{stopped:?}");
    assert!(text(&["--version"]).starts_with("tandem 0."));
    assert!(text(&["run", "--help"]).contains("Examples:"));
    assert!(text(&["completions", "bash"]).contains("tandem"));
    assert!(text(&["man"]).contains(".TH"));
}

#[test]
fn raw_logits_are_those_of_the_reference() {
    let manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(golden("manifest.json")).unwrap()).unwrap();
    let model = manifest["models"].as_array().unwrap().iter().find(|m| m["name"] == "qwen35-f32").unwrap();
    let prompt = &model["prompts"].as_array().unwrap()[0];
    let tokens: Vec<String> = prompt["tokens"].as_array().unwrap().iter().map(|t| t.to_string()).collect();
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("logits.f32");
    let args = ["logits", &golden("qwen35-f32.gguf"), "--tokens", &tokens.join(","), "--out", out.to_str().unwrap()];
    let output = tandem(&args, &[("TANDEM_KV_DTYPE", "f32")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let floats = |bytes: &[u8]| -> Vec<f32> {
        bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let found = floats(&std::fs::read(&out).unwrap());
    let n_vocab = model["vocab"].as_u64().unwrap() as usize;
    assert_eq!(found.len(), tokens.len() * n_vocab);
    let data = floats(&std::fs::read(golden("qwen35-f32.bin")).unwrap());
    let first = prompt["logits"]["offset"].as_u64().unwrap() as usize / 4;
    for (i, position) in prompt["positions"].as_array().unwrap().iter().enumerate() {
        let row = position.as_u64().unwrap() as usize;
        let expected = &data[first + i * n_vocab..][..n_vocab];
        let error = found[row * n_vocab..][..n_vocab].iter().zip(expected).map(|(a, b)| (a - b).abs());
        let worst = error.fold(0.0, |m: f32, e| if e.is_nan() { f32::INFINITY } else { m.max(e) });
        assert!(worst < 1e-4, "position {row}: {worst}");
    }
}

#[test]
fn bench_measures_each_row_from_its_beginning() {
    for model in ["qwen35-f32.gguf", "llama-f32.gguf"] {
        let args = ["bench", &golden(model), "-p", "8,40", "-n", "4", "-d", "0,20", "-r", "2", "--json"];
        let output = tandem(&args, &[]);
        assert!(output.status.success(), "{model}: {}", String::from_utf8_lossy(&output.stderr));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let rows = report["rows"].as_array().unwrap();
        let tests: Vec<&str> = rows.iter().map(|row| row["test"].as_str().unwrap()).collect();
        assert_eq!(tests, ["pp8", "pp40", "tg4", "pp8", "pp40", "tg4"]);
        for row in rows {
            let rates = row["rates"].as_array().unwrap();
            assert_eq!(rates.len(), 2);
            assert!(rates.iter().all(|rate| rate.as_f64().unwrap() > 0.0), "{row}");
        }
    }
}

/// Bench plans with what the plan's threads read now, and compares generation with what a plain loop reads of the same
/// weights; for another machine it plans with that machine's facts, and measures nothing.
#[test]
fn bench_says_what_memory_gave() {
    let report = |args: &[&str]| -> serde_json::Value {
        let model = golden("qwen35moe-q4_k_m.gguf");
        let output =
            tandem(&[&["bench", &model, "-p", "0", "-n", "2", "-r", "3", "--vram", "0", "--json"], args].concat(), &[]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let here = report(&["--threads", "1"]);
    let (host, row) = (&here["machine"], &here["rows"][0]);
    assert_eq!(host["threads"], 1);
    assert_eq!(host["read"].as_array().unwrap().len(), 1);
    assert_eq!(host["read"][0]["gb_per_s"], here["reading_gb_per_s"]);
    let number = |v: &serde_json::Value| v.as_f64().unwrap();
    let numbers = |v: &serde_json::Value| v.as_array().unwrap().iter().map(number).collect::<Vec<_>>();
    let (rates, loops) = (numbers(&row["rates"]), numbers(&row["read"]["weights_gb_per_s"]));
    let bytes = number(&row["read"]["bytes_per_token"]);
    let mut shares: Vec<f64> = rates.iter().zip(&loops).map(|(rate, of)| rate * bytes * 1e-9 / of).collect();
    shares.sort_by(f64::total_cmp);
    let share = number(&row["read"]["share"]);
    assert!(loops.len() == 3 && (share / shares[1] - 1.0).abs() < 1e-3, "{share} of {shares:?}");
    let elsewhere = report(&["--machine", "server-16c-128gb", "--threads", "1"]);
    assert_eq!(elsewhere["machine"]["threads"], 16);
    assert_eq!(elsewhere["rows"][0]["read"]["weights_gb_per_s"], serde_json::json!([]));
    let portable = report(&["--cpu-isa", "portable"]);
    assert_eq!(portable["machine"]["isa"], "portable");
    assert_eq!(portable["machine"]["kernels"], serde_json::json!([]), "the rates of other kernels");
}

/// What `--log` and its twin ask for is told on standard error, and nothing more.
#[test]
fn logs_go_to_standard_error_as_asked() {
    let run = |args: &[&str], vars: &[(&str, &str)]| {
        let output = tandem(&[&["run", "-p", "Hello", "-n", "1", "--vram", "0"], args].concat(), vars);
        assert_eq!(output.status.code(), Some(0));
        String::from_utf8(output.stderr).unwrap()
    };
    let loaded = "GB of weights loaded in";
    assert!(!run(&[], &[]).contains(loaded));
    assert!(run(&["--log", "info"], &[]).contains(loaded));
    assert!(run(&[], &[("TANDEM_LOG", "tandem::engine=info")]).contains(loaded));
    assert!(!run(&["--log", "warn"], &[("TANDEM_LOG", "info")]).contains(loaded));
    assert_refused(&["probe", "--log", "tandem=loud"], &[], 2, &["--log", "loud"]);
}
