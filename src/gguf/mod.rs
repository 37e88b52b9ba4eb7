//! GGUF files: header, metadata, tensor table, split sets and the mapped bytes. Everything that a file says is
//! checked here before it is used as a size or a position: what [`File::open`] returns has unique names, whole blocks
//! and bytes inside the file. What a tensor means is the business of [`crate::model`].

mod error;
mod header;
mod map;
mod metadata;
mod scales;

pub use error::{Error, Place, quoted};
pub use header::Problems;
pub use metadata::{Array, FromValue, Metadata, Strings, Value, ValueType};

use header::Header;
use map::Mapping;
use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Seek;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tandem_spec::{Tensor, TensorSource};

/// Files of the longest split set that is opened.
const PARTS_MAX: usize = 1024;

/// A GGUF file or split set, opened and checked.
#[derive(Debug)]
pub struct File {
    parts: Vec<Part>,
    /// Tensors of all parts, in file order.
    tensors: Vec<Tensor>,
    /// Part and bytes of each tensor.
    places: Vec<(usize, Range<usize>)>,
    by_name: HashMap<String, usize>,
    /// Tensors that some part lists but that are not sound; only [`File::examine`] returns a file with any.
    refused: Vec<String>,
}

#[derive(Debug)]
struct Part {
    file: String,
    version: u32,
    metadata: Metadata,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Mapped { map: Mapping, file: std::fs::File },
    Bytes(Cow<'static, [u8]>),
}

impl Data {
    fn bytes(&self) -> &[u8] {
        match self {
            Data::Mapped { map, .. } => map.bytes(),
            Data::Bytes(bytes) => bytes,
        }
    }
}

impl File {
    /// Opens `path`; of a split set, the path of its first file. Fails with the first problem.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let mut problems = Problems::default();
        Self::examine(path, &mut problems).filter(|_| problems.0.is_empty()).ok_or_else(|| problems.0.swap_remove(0))
    }

    /// Opens a file that lies in memory, such as one compiled into the program; `name` stands for its path in messages.
    pub fn from_bytes(bytes: impl Into<Cow<'static, [u8]>>, name: &str) -> Result<Self, Error> {
        let mut problems = Problems::default();
        let bytes = bytes.into();
        let header = Header::read(name, &bytes[..], bytes.len() as u64, &mut problems);
        let part = header.map(|header| (name.to_string(), header, Data::Bytes(bytes)));
        let file = Self::join(part.into_iter().collect(), None, &mut problems);
        file.filter(|_| problems.0.is_empty()).ok_or_else(|| problems.0.swap_remove(0))
    }

    /// Opens `path` and reports every problem that can be found, not only the first. What is returned holds the
    /// tensors that are sound; `None` if the tables could not be read. Without problems it is what
    /// [`File::open`] returns.
    pub fn examine(path: impl AsRef<Path>, problems: &mut Problems) -> Option<Self> {
        let path = path.as_ref();
        let split = problems.keep(SplitName::of(path))?;
        let paths = split.as_ref().map_or_else(|| vec![path.to_path_buf()], SplitName::paths);
        let mut parts = Vec::new();
        for path in &paths {
            let name = path.display().to_string();
            let part = || -> Option<(String, Header, Data)> {
                let (map, mut file) = problems.keep(map_file(path, &name))?;
                let header = Header::read(&name, &mut file, map.bytes().len() as u64, problems)?;
                Some((name, header, Data::Mapped { map, file }))
            };
            parts.push(part());
        }
        // A set is whole or not usable, but the problems of every part have been listed.
        let parts: Vec<_> = parts.into_iter().collect::<Option<_>>()?;
        Self::join(parts, split, problems)
    }

    /// One file of all parts (at least one, or none if the only one could not be read).
    fn join(parts: Vec<(String, Header, Data)>, split: Option<SplitName>, problems: &mut Problems) -> Option<Self> {
        let n_parts = parts.len();
        let mut out = Self {
            parts: Vec::new(),
            tensors: Vec::new(),
            places: Vec::new(),
            by_name: HashMap::new(),
            refused: vec![],
        };
        for (index, (file, header, data)) in parts.into_iter().enumerate() {
            let Header { version, metadata, tensors, refused } = header;
            let mut expect = |key: &str, wanted: usize, needed: bool| match metadata.get::<usize>(key) {
                Ok(None) if !needed => {}
                Ok(Some(found)) if found == wanted => {}
                Ok(Some(found)) => problems.push(metadata.error(key, wanted.to_string(), found.to_string())),
                Ok(None) => problems.push(metadata.error(key, wanted.to_string(), "no such key")),
                Err(e) => problems.push(e),
            };
            expect("split.no", index, split.is_some() && n_parts > 1);
            expect("split.count", n_parts, split.is_some() && n_parts > 1);
            for placed in tensors {
                let name = placed.tensor.name.clone();
                if out.by_name.insert(name.clone(), out.tensors.len()).is_some() {
                    problems.push(Error::tensor(
                        &file,
                        &name,
                        "every tensor once",
                        "it in another file of the set too",
                    ));
                }
                out.tensors.push(placed.tensor);
                out.places.push((index, placed.bytes));
            }
            out.refused.extend(refused);
            out.parts.push(Part { file, version, metadata, data });
        }
        let metadata = out.parts.first().map(|p| &p.metadata)?;
        const TOTAL: &str = "split.tensors.count";
        let found = out.tensors.len() + out.refused.len();
        match metadata.get::<usize>(TOTAL) {
            Ok(Some(total)) if total != found => {
                problems.push(metadata.error(TOTAL, format!("{found}, the tensors of all files"), total.to_string()))
            }
            Ok(_) => {}
            Err(e) => problems.push(e),
        }
        if found as u64 > header::TENSORS_MAX {
            let expected = format!("at most {} tensors", header::TENSORS_MAX);
            problems.push(Error::file(&metadata.file, expected, found.to_string()));
        }
        Some(out)
    }

    /// Path of the first file, or the name that was given with the bytes.
    pub fn name(&self) -> &str {
        &self.parts[0].file
    }

    /// Format version of the first file: 2 or 3.
    pub fn version(&self) -> u32 {
        self.parts[0].version
    }

    /// Files of the set; 1 for a file that is not split.
    pub fn n_parts(&self) -> usize {
        self.parts.len()
    }

    /// Bytes of all files of the set.
    pub fn n_bytes(&self) -> usize {
        self.parts.iter().map(|p| p.data.bytes().len()).sum()
    }

    /// Metadata of the first file, which of a split set has all.
    pub fn metadata(&self) -> &Metadata {
        &self.parts[0].metadata
    }

    /// Every tensor, in file order: the table that [`tandem_spec::Weight::tensor`] counts in.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Index of the tensor `name` in [`File::tensors`].
    pub fn tensor_index(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Names of tensors that the file lists but that are not sound; empty unless from [`File::examine`].
    pub fn refused(&self) -> &[String] {
        &self.refused
    }

    /// An error if a mapped file has become shorter since it was opened. Tensor bytes behind the new end read
    /// as zeros (on Unix), so whoever computes with them asks afterwards.
    pub fn check_unchanged(&self) -> Result<(), Error> {
        for part in &self.parts {
            if let Data::Mapped { map, file } = &part.data {
                let now = file.metadata().map_err(|e| Error::file(&part.file, "a readable file", e.to_string()))?.len();
                let then = map.bytes().len();
                if map.shrunk() || now < then as u64 {
                    let found = format!("{now} bytes: it became shorter while it was in use");
                    return Err(Error::file(&part.file, format!("the {then} bytes it had when it was opened"), found));
                }
            }
        }
        Ok(())
    }
}

/// Bytes lie where the file has them: a tensor's address is a multiple of `general.alignment` (at least 8) in mapped
/// files, and has no particular alignment in files opened with [`File::from_bytes`].
impl TensorSource for File {
    fn bytes(&self, tensor: usize) -> &[u8] {
        let (part, bytes) = &self.places[tensor];
        &self.parts[*part].data.bytes()[bytes.clone()]
    }
}

/// Maps the regular file `path`; the handle stands at its start.
fn map_file(path: &Path, name: &str) -> Result<(Mapping, std::fs::File), Error> {
    let failed = |e: std::io::Error| Error::file(name, "a readable file", e.to_string());
    // Before opening: a named pipe would wait for a writer.
    let facts = std::fs::metadata(path).map_err(failed)?;
    if !facts.is_file() {
        let found = if facts.is_dir() { "a directory" } else { "something else" };
        return Err(Error::file(name, "a regular file", found));
    }
    if facts.len() == 0 {
        return Err(Error::file(name, "a GGUF file", "an empty file"));
    }
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let map = Mapping::new(&file).map_err(failed)?;
    file.rewind().map_err(failed)?;
    Ok((map, file))
}

/// `<stem>-00001-of-0000N.gguf`, the name of the first file of a split set.
struct SplitName {
    folder: PathBuf,
    stem: String,
    count: usize,
}

impl SplitName {
    /// `None` for a name that is not of this form; an error for a later file of a set.
    fn of(path: &Path) -> Result<Option<Self>, Error> {
        let number = |text: &str| text.parse::<usize>().ok().filter(|_| text.bytes().all(|b| b.is_ascii_digit()));
        let parse = || {
            let name = path.file_name()?.to_str()?.strip_suffix(".gguf")?;
            let (name, count) = name.rsplit_once("-of-").filter(|(_, count)| count.len() == 5)?;
            let (stem, no) = name.rsplit_once('-').filter(|(_, no)| no.len() == 5)?;
            Some((stem.to_string(), number(no)?, number(count)?))
        };
        let Some((stem, no, count)) = parse() else { return Ok(None) };
        let split = Self { folder: path.with_file_name(""), stem, count };
        let name = path.display().to_string();
        if count == 0 || count > PARTS_MAX {
            return Err(Error::file(&name, format!("a split set of 1 to {PARTS_MAX} files"), count.to_string()));
        }
        if no != 1 {
            let first = split.path(1).display().to_string();
            return Err(Error::file(&name, format!("the first file of the set, {first}"), format!("file {no}")));
        }
        Ok(Some(split))
    }

    fn path(&self, no: usize) -> PathBuf {
        self.folder.join(format!("{}-{no:05}-of-{:05}.gguf", self.stem, self.count))
    }

    fn paths(&self) -> Vec<PathBuf> {
        (1..=self.count).map(|no| self.path(no)).collect()
    }
}
