//! `tandem inspect`: what is in a file, which blocks its bytes belong to, and everything that is wrong with it. A bad
//! file is shown as far as it can be read; nothing is computed with it.

use crate::gguf::{Error, File, Place, Problems, Value, quoted};
use crate::model;
use crate::text::{ChatTemplate, Tokenizer, Vocabulary};
use serde_json::json;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use tandem_spec::{Model, Weight};

/// Options of `tandem inspect`.
#[derive(clap::Args, Debug)]
pub struct InspectArgs {
    /// GGUF file; of a split set the first file
    pub model: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
    /// Check the tokenizer and the chat template and read every tensor too: report scales that are infinite or not a
    /// number
    #[arg(long)]
    pub verify: bool,
}

/// Elements of a metadata array that are shown.
const ARRAY_SHOWN: usize = 8;

/// What is in a file.
#[derive(Debug, Default, serde::Serialize)]
pub struct Report {
    /// Path as given.
    pub file: String,
    /// Format version; 0 if the header could not be read.
    pub version: u32,
    /// Files of the split set.
    pub files: usize,
    /// Bytes of all files.
    pub bytes: usize,
    /// Key, value; of long arrays the type, the length and the first elements.
    pub metadata: Vec<(String, serde_json::Value)>,
    /// Sound tensors, in file order.
    pub tensors: Vec<TensorLine>,
    /// Bytes of each kind of block, if the file holds a model.
    pub blocks: Vec<BlockLine>,
    /// Tensors that no block uses.
    pub unused: Vec<String>,
    /// Everything that is wrong.
    pub problems: Vec<String>,
}

/// One tensor.
#[derive(Debug, serde::Serialize)]
#[allow(missing_docs)]
pub struct TensorLine {
    pub name: String,
    pub r#type: &'static str,
    /// ggml order: the contiguous dimension first.
    pub shape: Vec<usize>,
    pub bytes: usize,
}

/// All blocks of one kind.
#[derive(Debug, serde::Serialize)]
#[allow(missing_docs)]
pub struct BlockLine {
    pub kind: &'static str,
    pub blocks: usize,
    pub tensors: usize,
    /// A tensor that several blocks use counts where it is used first.
    pub bytes: usize,
}

/// Shows the file; an error if anything is wrong with it.
pub fn run(args: InspectArgs) -> anyhow::Result<()> {
    let report = inspect(&args.model, args.verify);
    let text = match args.json {
        true => serde_json::to_string_pretty(&report)? + "\n",
        false => report.text(),
    };
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        // Whoever reads has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {}
        result => result?,
    }
    match &report.problems[..] {
        [] => Ok(()),
        [only] => Err(anyhow::anyhow!("{only}")),
        [first, rest @ ..] => Err(anyhow::anyhow!("{first} (and {} more problems, listed above)", rest.len())),
    }
}

/// Reads the file at `path`; with `verify` the tokenizer, the chat template and every tensor's scales too.
pub fn inspect(path: &std::path::Path, verify: bool) -> Report {
    let mut report = Report { file: path.display().to_string(), ..Report::default() };
    let mut problems = Problems::default();
    if let Some(file) = File::examine(path, &mut problems) {
        report.version = file.version();
        report.files = file.n_parts();
        report.bytes = file.n_bytes();
        report.metadata = file.metadata().iter().map(|(key, value)| (key.to_string(), to_json(value))).collect();
        let line = |t: &tandem_spec::Tensor| TensorLine {
            name: t.name.clone(),
            r#type: t.ty.name(),
            shape: t.ne.clone(),
            bytes: t.n_bytes(),
        };
        report.tensors = file.tensors().iter().map(line).collect();
        let mut of_model = Problems::default();
        if let Some(model) = model::examine(&file, &mut of_model) {
            let owners = owners(&file, &model);
            report.blocks = block_lines(&file, &model, &owners);
            let unused = owners.iter().zip(file.tensors()).filter(|(owner, _)| owner.is_none());
            report.unused = unused.map(|(_, tensor)| tensor.name.clone()).collect();
        }
        // A tensor that was refused is not missing.
        let refused = |e: &Error| matches!(&e.place, Place::Tensor(name) if file.refused().contains(name));
        of_model.0.into_iter().filter(|e| !refused(e)).for_each(|e| problems.push(e));
        if verify {
            problems.keep(Vocabulary::from_metadata(file.metadata()).and_then(Tokenizer::new));
            problems.keep(ChatTemplate::verify(file.metadata()));
            non_finite_scales(&file).into_iter().for_each(|e| problems.push(e));
            problems.keep(file.check_unchanged());
        }
    }
    report.problems = problems.0.iter().map(Error::to_string).collect();
    report
}

const MTP: &str = "mtp";

/// The kind of the first block that uses each tensor.
fn owners(file: &File, model: &Model) -> Vec<Option<&'static str>> {
    let mut owners = vec![None; file.tensors().len()];
    for block in &model.blocks {
        block.for_each(&mut |w: &Weight| {
            owners[w.tensor].get_or_insert(block.kind());
        });
    }
    if let Some(mtp) = &model.mtp {
        let Ok(_) = mtp.try_map(&mut |w| -> Result<(), std::convert::Infallible> {
            owners[w.tensor].get_or_insert(MTP);
            Ok(())
        });
    }
    owners
}

fn block_lines(file: &File, model: &Model, owners: &[Option<&'static str>]) -> Vec<BlockLine> {
    let mut lines: Vec<BlockLine> = Vec::new();
    for kind in model.blocks.iter().map(|b| b.kind()).chain(model.mtp.iter().map(|_| MTP)) {
        match lines.iter_mut().find(|line| line.kind == kind) {
            Some(line) => line.blocks += 1,
            None => lines.push(BlockLine { kind, blocks: 1, tensors: 0, bytes: 0 }),
        }
    }
    for (tensor, owner) in file.tensors().iter().zip(owners) {
        if let Some(line) = lines.iter_mut().find(|line| Some(line.kind) == *owner) {
            line.tensors += 1;
            line.bytes += tensor.n_bytes();
        }
    }
    lines
}

/// An error for every tensor with an infinite scale or one that is not a number.
fn non_finite_scales(file: &File) -> Vec<Error> {
    let next = AtomicUsize::new(0);
    let check = || {
        let mut found = Vec::new();
        loop {
            let index = next.fetch_add(1, Relaxed);
            let Some(tensor) = file.tensors().get(index) else { return found };
            if let Some(block) = file.non_finite_block(index) {
                let name = tensor.name.as_str();
                let what = format!("one that is not, in block {block}");
                found.push((index, Error::tensor(file.name(), name, "finite scales and values", what)));
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut found: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(check)).collect();
        workers.into_iter().flat_map(|w| w.join().expect("checking a tensor does not panic")).collect()
    });
    found.sort_by_key(|(index, _)| *index);
    found.into_iter().map(|(_, error)| error).collect()
}

fn to_json(value: Value<'_>) -> serde_json::Value {
    match value {
        Value::F32(v) => json!(v),
        Value::F64(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::String(s) => json!(String::from_utf8_lossy(s)),
        Value::Array(a) if a.len <= ARRAY_SHOWN => a.iter().map(to_json).collect(),
        Value::Array(a) => {
            let first: Vec<_> = a.iter().take(ARRAY_SHOWN).map(to_json).collect();
            json!({ "array_of": a.ty.name(), "len": a.len, "first": first })
        }
        Value::U64(v) => json!(v),
        other => json!(other.integer().and_then(|v| i64::try_from(v).ok())),
    }
}

impl Report {
    /// The report for a person. Names and texts of the file are escaped.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let line = &mut out;
        let files = if self.files == 1 { String::new() } else { format!(" in {} files", self.files) };
        if self.version > 0 {
            writeln!(line, "{}: GGUF version {}, {}{files}", self.file, self.version, size(self.bytes)).unwrap();
            writeln!(line, "\nmetadata, {} keys", self.metadata.len()).unwrap();
            for (key, value) in &self.metadata {
                let shown = match value {
                    serde_json::Value::String(s) => quoted(s.as_bytes()),
                    serde_json::Value::Object(o) => format!("{} {} {}", o["len"], o["array_of"], o["first"]),
                    other => other.to_string(),
                };
                writeln!(line, "  {:44} {shown}", plain(key)).unwrap();
            }
            writeln!(line, "\ntensors, {}", self.tensors.len()).unwrap();
            for t in &self.tensors {
                let shape = format!("{:?}", t.shape);
                writeln!(line, "  {:44} {:7} {shape:22} {:>14}", plain(&t.name), t.r#type, t.bytes).unwrap();
            }
        }
        if !self.blocks.is_empty() {
            writeln!(line, "\nblocks").unwrap();
            for b in &self.blocks {
                let bytes = size(b.bytes);
                writeln!(line, "  {:10} {:4} blocks {:5} tensors {bytes:>12}", b.kind, b.blocks, b.tensors).unwrap();
            }
        }
        for (title, list) in [("tensors that no block uses", &self.unused), ("problems", &self.problems)] {
            if !list.is_empty() {
                writeln!(line, "\n{title}, {}", list.len()).unwrap();
                list.iter().for_each(|item| writeln!(line, "  {}", plain(item)).unwrap());
            }
        }
        out
    }
}

/// Text without control characters.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Bytes for a person.
fn size(bytes: usize) -> String {
    let (mut value, mut unit) = (bytes as f64, "bytes");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    if unit == "bytes" { format!("{bytes} bytes") } else { format!("{value:.1} {unit}") }
}
