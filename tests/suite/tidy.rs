//! Style that a machine can check: who may import whom, which outside crate has which owner, where the
//! environment is read, the width of comments, and dead files.

use std::path::{Path, PathBuf};

/// A source file, its path relative to the repository with forward slashes.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// Code lines with their numbers from 1: without comment lines, and without a test module at the end.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let body = self.text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        body.lines().enumerate().map(|(i, line)| (i + 1, line)).filter(|(_, line)| !line.trim_start().starts_with("//"))
    }
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every source file with one of `extensions` that belongs to the repository.
fn sources(extensions: &[&str]) -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a readable folder") {
            let path = entry.expect("a readable entry").path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if path.is_dir() {
                if !name.starts_with('.') && name != "target" {
                    folders.push(path);
                }
            } else if path.extension().and_then(|e| e.to_str()).is_some_and(|e| extensions.contains(&e)) {
                let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                let path = path.strip_prefix(root()).expect("below the root").to_string_lossy().replace('\\', "/");
                found.push(Source { path, text });
            }
        }
    }
    assert!(found.len() > 20 || extensions != ["rs"], "the walk lost its way");
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

/// Fails with one line for each violation.
fn report(violations: &[String]) {
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
}

/// Whether `line` uses the crate or module `name`.
fn uses(line: &str, name: &str) -> bool {
    line.match_indices(name).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = &line[at + name.len()..];
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        !before.is_some_and(is_word) && (after.starts_with("::") || after.starts_with(';') || after.starts_with(" as "))
    })
}

/// Rooms and what no line of code in them may use.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("spec/", &["tandem", "tandem_cpu", "tandem_cuda"]),
    ("cpu/", &["tandem", "tandem_cuda"]),
    ("cuda/", &["tandem", "tandem_cpu"]),
    ("src/gguf/", &["tandem_cpu", "tandem_cuda"]),
    ("src/model/", &["tandem_cpu", "tandem_cuda"]),
    // The plan is a pure function: no file, no clock, no device. It asks the backends for sizes in one place.
    ("src/plan/", &["std::fs", "std::time", "std::env"]),
    ("src/plan/mod.rs", &["tandem_cuda"]),
    ("src/plan/choose.rs", &["tandem_cpu", "tandem_cuda"]),
    ("src/plan/predict.rs", &["tandem_cpu", "tandem_cuda"]),
    ("src/plan/show.rs", &["tandem_cpu", "tandem_cuda"]),
    ("src/plan/time.rs", &["tandem_cuda"]),
];

#[test]
fn rooms_import_in_one_direction() {
    let mut violations = Vec::new();
    for source in sources(&["rs"]) {
        let forbidden =
            FORBIDDEN.iter().filter(|(room, _)| source.path.starts_with(room)).flat_map(|(_, names)| *names);
        for name in forbidden {
            let lines = source.code().filter(|(_, line)| uses(line, name));
            violations.extend(lines.map(|(n, _)| format!("{}:{n}: uses {name}, which this room may not", source.path)));
        }
    }
    report(&violations);
}

/// Outside crates and the only places that may use them: swapping one touches one place. Files are mapped in one
/// place, and pages without a file in another. (`benches/peer` is a package of its own.)
const OWNERS: &[(&str, &str)] = &[
    ("memmap2", "src/gguf/"),
    ("memmap2", "cpu/"),
    // Pinned memory, and stand-ins for that of the CPU backend.
    ("memmap2", "cuda/"),
    ("sysinfo", "src/machine/"),
    ("tokenizers", "src/text/"),
    ("minijinja", "src/text/"),
    ("minijinja_contrib", "src/text/"),
    ("clap", "src/cli/"),
    ("clap_complete", "src/cli/"),
    ("clap_mangen", "src/cli/"),
    ("indicatif", "src/cli/"),
    ("rustyline", "src/cli/"),
    ("ctrlc", "src/cli/"),
    ("tracing_subscriber", "src/cli/"),
    ("rayon", "cpu/"),
    ("cudarc", "cuda/"),
    ("gguf_rs", "tests/"),
];

#[test]
fn outside_crates_have_one_owner() {
    let mut violations = Vec::new();
    for source in sources(&["rs"]) {
        if source.path.starts_with("benches/peer/") {
            continue;
        }
        for (name, owner) in OWNERS {
            if OWNERS.iter().any(|(n, owner)| n == name && source.path.starts_with(owner)) {
                continue;
            }
            let lines = source.code().filter(|(_, line)| uses(line, name));
            violations.extend(lines.map(|(n, _)| format!("{}:{n}: uses {name}, owned by {owner}", source.path)));
        }
    }
    report(&violations);
}

/// Options are read in one place: the environment belongs to the command line.
#[test]
fn environment_is_read_by_the_command_line_only() {
    let mut violations = Vec::new();
    for source in sources(&["rs"]) {
        let is_library =
            ["spec/src/", "cpu/src/", "cuda/src/", "src/"].iter().any(|room| source.path.starts_with(room));
        if !is_library || source.path.starts_with("src/cli/") {
            continue;
        }
        let lines = source.code().filter(|(_, line)| line.contains("env::var"));
        violations.extend(lines.map(|(n, _)| format!("{}:{n}: reads the environment; options come in", source.path)));
    }
    report(&violations);
}

/// Every Rust file is a root that Cargo finds, or a module that another file declares, or named by its path in an
/// attribute or a manifest; every CUDA source is named by a Rust file or by another source.
#[test]
fn no_file_is_dead() {
    let mut violations = Vec::new();
    let rust = sources(&["rs"]);
    let manifests = sources(&["toml"]);
    let cuda = sources(&["cu", "cuh"]);
    for source in &rust {
        let path = Path::new(&source.path);
        let file_name = path.file_name().and_then(|n| n.to_str()).expect("a file has a name");
        let folder = path.parent().and_then(|f| f.file_name()).and_then(|f| f.to_str()).unwrap_or_default();
        let is_root = matches!(file_name, "lib.rs" | "main.rs" | "build.rs")
            || (matches!(folder, "tests" | "benches" | "examples" | "bin") && !source.path.starts_with("tests/"));
        let module = if file_name == "mod.rs" { folder } else { file_name.strip_suffix(".rs").expect("a Rust file") };
        let declares = |line: &str| {
            let line = line.trim().strip_suffix(';').unwrap_or_default();
            line.strip_suffix(module).is_some_and(|l| l == "mod " || l.ends_with(" mod "))
        };
        let room = source.path.split('/').next().unwrap_or_default();
        let is_declared = rust.iter().any(|s| s.path.starts_with(room) && s.text.lines().any(declares));
        let is_named = rust.iter().chain(&manifests).any(|s| s.text.contains(&format!("{file_name}\"")));
        if !is_root && !is_declared && !is_named {
            violations.push(format!("{}: no module declares it", source.path));
        }
    }
    for source in &cuda {
        let name = source.path.rsplit('/').next().unwrap_or(&source.path);
        let named = rust.iter().chain(&cuda).any(|s| s.path != source.path && s.text.contains(name));
        if !named {
            violations.push(format!("{}: nothing names it", source.path));
        }
    }
    report(&violations);
}

/// Backends know no model: no code line of a kernel or launcher names an architecture.
#[test]
fn backends_name_no_architecture() {
    let mut violations = Vec::new();
    for source in sources(&["rs", "cu", "cuh"]) {
        if !source.path.starts_with("cpu/src/") && !source.path.starts_with("cuda/src/") {
            continue;
        }
        for (n, line) in source.code() {
            let line = line.to_lowercase();
            if ["qwen", "llama"].iter().any(|name| line.contains(name)) {
                violations.push(format!("{}:{n}: names a model architecture", source.path));
            }
        }
    }
    report(&violations);
}

/// rustfmt leaves comments as wide as they are, and formats no CUDA sources.
#[test]
fn comments_fit_the_width() {
    const WIDTH: usize = 120;
    let mut violations = Vec::new();
    for source in sources(&["rs", "cu", "cuh"]) {
        for (i, line) in source.text.lines().enumerate() {
            // Behind code a comment follows the end of something; in a text two slashes may follow anything.
            let ends = |at: usize| line[..at].trim_end().ends_with([';', ',', '{', '}', ')']);
            let has_comment = line.trim_start().starts_with("//") || line.match_indices(" // ").any(|(at, _)| ends(at));
            let width = line.chars().count();
            if has_comment && width > WIDTH {
                violations.push(format!("{}:{}: a comment up to column {width}", source.path, i + 1));
            }
        }
    }
    report(&violations);
}

/// What is not understood is said plainly and gets a test; what is left to do lives in no source file.
#[test]
fn no_notes_to_self() {
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X:"), concat!("HA", "CK")];
    let mut violations = Vec::new();
    for source in sources(&["rs", "cu", "cuh", "py", "toml"]) {
        for (i, line) in source.text.lines().enumerate() {
            if marks.iter().any(|mark| line.contains(mark)) {
                violations.push(format!("{}:{}: a note to self", source.path, i + 1));
            }
        }
    }
    report(&violations);
}
