//! The header of one file: counts, metadata and the tensor table, checked entry by entry. The header's bytes are
//! copied as they are read, so that nothing in it can change after its check; no number from the file sizes an
//! allocation before it was compared with the bytes that are left.

use super::error::{Error, quoted};
use super::metadata::{Entry, Metadata, ValueType};
use std::collections::HashSet;
use std::io::Read;
use std::ops::Range;
use tandem_spec::tensor_type::{TYPES, TensorType};

/// Bytes of the largest header: ten times that of a vocabulary of a million tokens.
const HEADER_BYTES_MAX: u64 = 1 << 28;
/// Keys of the longest metadata; real files have fewer than a hundred.
const KEYS_MAX: u64 = 1 << 16;
/// Tensors of one file or split set; the largest known models have a few thousand.
pub(super) const TENSORS_MAX: u64 = 1 << 16;
const KEY_BYTES_MAX: u64 = 65535;
const NAME_BYTES_MAX: u64 = 63;
const ARRAY_LEN_MAX: u64 = 1 << 30;
/// Key length, one byte of key, value type, one byte of value.
const KEY_ENTRY_BYTES_MIN: u64 = 8 + 1 + 4 + 1;
/// Name length, number of dimensions, one dimension, type, offset; the name may be empty as far as this bound goes.
const TENSOR_ENTRY_BYTES_MIN: u64 = 8 + 4 + 8 + 4 + 8;
/// Problems that are collected; a file with more is bad enough.
const PROBLEMS_MAX: usize = 1000;

/// Problems in the order in which they were found.
#[derive(Debug, Default)]
pub struct Problems(pub Vec<Error>);

impl Problems {
    /// Adds a problem, unless there are a thousand already.
    pub fn push(&mut self, problem: Error) {
        if self.0.len() < PROBLEMS_MAX {
            self.0.push(problem);
        }
    }

    /// The value of an `Ok`; an error becomes a problem.
    pub fn keep<T>(&mut self, result: Result<T, Error>) -> Option<T> {
        result.map_err(|e| self.push(e)).ok()
    }
}

/// A tensor of the table, and where its bytes lie in the file.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) tensor: tandem_spec::Tensor,
    /// Bytes in the file; within it, unless `Header::read` reported otherwise and left the tensor out.
    pub(super) bytes: Range<usize>,
}

/// Header of one file.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: Metadata,
    /// The sound tensors, in file order.
    pub(super) tensors: Vec<Placed>,
    /// Names of tensors that the table lists but that are not sound.
    pub(super) refused: Vec<String>,
}

/// Bounds-checked reads from the start of a file, kept in `bytes`.
struct Cursor<'f, R> {
    file: &'f str,
    source: R,
    /// Bytes of the file.
    len: u64,
    bytes: Vec<u8>,
    at: usize,
}

impl<R: Read> Cursor<'_, R> {
    fn left(&self) -> u64 {
        self.len - self.at as u64
    }

    fn error(&self, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::offset(self.file, self.at as u64, expected, found)
    }

    /// The next `n` bytes, which are `what`.
    fn take(&mut self, n: u64, what: &str) -> Result<Range<usize>, Error> {
        if n > self.left() {
            return Err(
                self.error(format!("{what} of {n} bytes"), format!("the end of the file after {}", self.left()))
            );
        }
        if n > HEADER_BYTES_MAX - self.at as u64 {
            return Err(
                self.error(format!("a header of at most {HEADER_BYTES_MAX} bytes"), format!("{what} of {n} bytes"))
            );
        }
        let end = self.at + n as usize;
        if end > self.bytes.len() {
            let missing = end - self.bytes.len();
            // Large steps, so that few of them read a real header; never more than the file has.
            let step = missing.max(self.bytes.len()).max(1 << 16) as u64;
            let read = self.source.by_ref().take(step).read_to_end(&mut self.bytes);
            read.map_err(|e| self.error("readable bytes", e.to_string()))?;
            if end > self.bytes.len() {
                return Err(self.error(what, "a file that became shorter while it was read"));
            }
        }
        let start = std::mem::replace(&mut self.at, end);
        Ok(start..end)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        let range = self.take(N as u64, what)?;
        Ok(self.bytes[range].try_into().expect("N bytes were taken"))
    }

    fn u32(&mut self, what: &str) -> Result<u32, Error> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, Error> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A string: its u64 length, then that many bytes.
    fn string(&mut self, what: &str, longest: u64) -> Result<Range<usize>, Error> {
        let n = self.u64(what)?;
        if n > longest {
            return Err(self.error(format!("{what} of at most {longest} bytes"), format!("a length of {n}")));
        }
        self.take(n, what)
    }

    /// A count of entries that take at least `entry_bytes` each.
    fn count(&mut self, what: &str, entry_bytes: u64, most: u64) -> Result<u64, Error> {
        let n = self.u64(what)?;
        let fit = (self.left() / entry_bytes).min(most);
        if n > fit {
            return Err(
                self.error(format!("at most {fit} {what} (of at least {entry_bytes} bytes each)"), n.to_string())
            );
        }
        Ok(n)
    }
}

impl Header {
    /// Reads the header of `file`, a source of `len` bytes. What is wrong goes to `problems`; `None` if the tables
    /// could not be read to their end.
    pub(super) fn read(file: &str, source: impl Read, len: u64, problems: &mut Problems) -> Option<Self> {
        let cursor = Cursor { file, source, len, bytes: Vec::new(), at: 0 };
        let read = Self::tables(cursor, problems);
        problems.keep(read)
    }

    /// Errors are those after which the next entry cannot be found.
    fn tables<R: Read>(mut cursor: Cursor<'_, R>, problems: &mut Problems) -> Result<Self, Error> {
        let file = cursor.file;
        let magic: [u8; 4] = cursor.array("the magic bytes \"GGUF\"")?;
        if &magic != b"GGUF" {
            return Err(Error::offset(file, 0, "the magic bytes \"GGUF\"", quoted(&magic)));
        }
        let version = cursor.u32("the format version")?;
        if version & 0xffff == 0 {
            return Err(Error::offset(file, 4, "a little-endian file", "a big-endian one, or version 0"));
        }
        if !matches!(version, 2 | 3) {
            return Err(Error::offset(file, 4, "format version 2 or 3", version.to_string()));
        }
        let n_tensors = cursor.count("tensors", TENSOR_ENTRY_BYTES_MIN, TENSORS_MAX)?;
        let n_keys = cursor.count("metadata keys", KEY_ENTRY_BYTES_MIN, KEYS_MAX)?;

        let mut entries: Vec<Entry> = Vec::new();
        let mut keys = HashSet::new();
        for _ in 0..n_keys {
            let entry = Self::entry(&mut cursor, problems)?;
            if !keys.insert(entry.key.clone()) {
                problems.push(Error::key(file, &entry.key, "every key once", "it a second time"));
                continue;
            }
            entries.push(entry);
        }
        let mut table = Vec::new();
        for _ in 0..n_tensors {
            table.push(RawTensor::read(&mut cursor)?);
        }

        let metadata = Metadata { file: file.into(), header: cursor.bytes, entries };
        let alignment = problems.keep(alignment(&metadata)).unwrap_or(ALIGNMENT_DEFAULT);
        // The header is at most HEADER_BYTES_MAX long and the alignment small: no overflow.
        let data_start = (cursor.at as u64).next_multiple_of(alignment);
        let mut header = Header { version, metadata, tensors: Vec::new(), refused: Vec::new() };
        let mut names = HashSet::new();
        for raw in table {
            let name = String::from_utf8_lossy(&header.metadata.header[raw.name.clone()]).into_owned();
            let before = problems.0.len();
            let mut wrong = |expected: String, found: String| {
                problems.push(Error::tensor(file, &name, expected, found));
            };
            if std::str::from_utf8(&header.metadata.header[raw.name.clone()]).is_err() || name.is_empty() {
                wrong("a name of UTF-8 that is not empty".into(), format!("a name of {} bytes", raw.name.len()));
            }
            if raw.name.len() as u64 > NAME_BYTES_MAX {
                wrong(format!("a name of at most {NAME_BYTES_MAX} bytes"), raw.name.len().to_string());
            }
            if !names.insert(raw.name_bytes(&header.metadata.header).to_vec()) {
                wrong("every tensor once".into(), "it a second time".into());
            }
            let placed = raw.place(&name, alignment, data_start, cursor.len, &mut wrong);
            match placed {
                Some(placed) if problems.0.len() == before => header.tensors.push(placed),
                _ => header.refused.push(name),
            }
        }
        header.refuse_overlaps(file, problems);
        Ok(header)
    }

    /// A key and its value.
    fn entry<R: Read>(cursor: &mut Cursor<'_, R>, problems: &mut Problems) -> Result<Entry, Error> {
        let at = cursor.at as u64;
        let key = cursor.string("a key", KEY_BYTES_MAX)?;
        let key = match std::str::from_utf8(&cursor.bytes[key.clone()]) {
            Ok(text) if !text.is_empty() => text.to_string(),
            _ => {
                let found = quoted(&cursor.bytes[key.clone()]);
                problems.push(Error::offset(cursor.file, at, "a key of UTF-8 that is not empty", found));
                String::from_utf8_lossy(&cursor.bytes[key]).into_owned()
            }
        };
        let in_key = |e: Error| {
            let found = format!(
                "{} (at byte {})",
                e.found,
                match e.place {
                    super::error::Place::Offset(at) => at,
                    _ => at,
                }
            );
            Error::key(&e.file, &key, e.expected, found)
        };
        let (ty, len, bytes) = Self::value(cursor).map_err(in_key)?;
        Ok(Entry { key, ty, len, bytes })
    }

    /// A value's type (of an array: its elements' type), number of elements and bytes.
    fn value<R: Read>(cursor: &mut Cursor<'_, R>) -> Result<(ValueType, Option<usize>, Range<usize>), Error> {
        let ty = value_type(cursor, "a value type")?;
        match ty {
            ValueType::Array => {
                let ty = value_type(cursor, "an element type")?;
                if ty == ValueType::Array {
                    return Err(cursor.error("an array of plain elements", "an array of arrays"));
                }
                let entry_bytes = ty.size().unwrap_or(8) as u64;
                let len = cursor.count("array elements", entry_bytes, ARRAY_LEN_MAX)?;
                let bytes = match ty.size() {
                    // `count` has compared the product with the bytes that are left.
                    Some(size) => cursor.take(len * size as u64, "an array")?,
                    None => {
                        let start = cursor.at;
                        for _ in 0..len {
                            cursor.string("a string of an array", HEADER_BYTES_MAX)?;
                        }
                        start..cursor.at
                    }
                };
                Ok((ty, Some(len as usize), bytes))
            }
            ValueType::String => Ok((ty, None, cursor.string("a string", HEADER_BYTES_MAX)?)),
            _ => Ok((ty, None, cursor.take(ty.size().expect("a scalar") as u64, "a value")?)),
        }
    }

    /// Removes and reports every tensor whose bytes begin before those of the tensor in front of it end.
    fn refuse_overlaps(&mut self, file: &str, problems: &mut Problems) {
        let mut order: Vec<usize> = (0..self.tensors.len()).collect();
        order.sort_by_key(|&i| (self.tensors[i].bytes.start, i));
        let mut refused = vec![false; self.tensors.len()];
        let mut last: Option<usize> = None;
        for i in order {
            let this = &self.tensors[i];
            if let Some(before) = last.map(|l| &self.tensors[l])
                && this.bytes.start < before.bytes.end
            {
                let expected = format!("bytes of its own, from byte {} on", before.bytes.end);
                let other = quoted(before.tensor.name.as_bytes());
                let found = format!("byte {}, which belongs to {other}", this.bytes.start);
                problems.push(Error::tensor(file, &this.tensor.name, expected, found));
                refused[i] = true;
            } else {
                last = Some(i);
            }
        }
        let mut bad = refused.iter();
        self.tensors.retain(|placed| {
            let bad = *bad.next().expect("one flag a tensor");
            if bad {
                self.refused.push(placed.tensor.name.clone());
            }
            !bad
        });
    }
}

fn value_type<R: Read>(cursor: &mut Cursor<'_, R>, what: &str) -> Result<ValueType, Error> {
    let id = cursor.u32(what)?;
    ValueType::from_id(id).ok_or_else(|| cursor.error(format!("{what} from 0 to 12"), id.to_string()))
}

const ALIGNMENT_DEFAULT: u64 = 32;

/// `general.alignment`. Real files have 32; the bounds keep tensors readable in place and the padding small.
fn alignment(metadata: &Metadata) -> Result<u64, Error> {
    const KEY: &str = "general.alignment";
    match metadata.get::<u32>(KEY)? {
        None => Ok(ALIGNMENT_DEFAULT),
        Some(a) if a.is_power_of_two() && (8..=1 << 20).contains(&a) => Ok(a.into()),
        Some(a) => Err(metadata.error(KEY, "a power of two from 8 to 1048576", a.to_string())),
    }
}

/// An entry of the tensor table as the file has it.
struct RawTensor {
    name: Range<usize>,
    ne: Vec<u64>,
    type_id: u32,
    offset: u64,
}

impl RawTensor {
    fn read<R: Read>(cursor: &mut Cursor<'_, R>) -> Result<Self, Error> {
        const NE_MAX: u32 = 4;
        let name = cursor.string("a tensor name", KEY_BYTES_MAX)?;
        let n_dims = cursor.u32("a number of dimensions")?;
        if !(1..=NE_MAX).contains(&n_dims) {
            // The entry's length depends on it: nothing after it can be read.
            let name = String::from_utf8_lossy(&cursor.bytes[name]);
            return Err(Error::tensor(cursor.file, &name, "1 to 4 dimensions", n_dims.to_string()));
        }
        let ne = (0..n_dims).map(|_| cursor.u64("a dimension")).collect::<Result<_, _>>()?;
        Ok(Self { name, ne, type_id: cursor.u32("a tensor type")?, offset: cursor.u64("a tensor offset")? })
    }

    fn name_bytes<'a>(&self, header: &'a [u8]) -> &'a [u8] {
        &header[self.name.clone()]
    }

    /// The tensor with its bytes, or `None` after telling `wrong` (expected, found) why not.
    fn place(
        &self,
        name: &str,
        alignment: u64,
        data_start: u64,
        file_len: u64,
        wrong: &mut dyn FnMut(String, String),
    ) -> Option<Placed> {
        let ty = TensorType::from_id(self.type_id);
        if ty.is_none() {
            let known: Vec<_> = TYPES.iter().map(|row| row.name).collect();
            wrong(format!("a tensor type of {}", known.join(", ")), format!("type id {}", self.type_id));
        }
        let shape = format!("shape {:?}", self.ne);
        let n_elements = self.ne.iter().try_fold(1i64, |n, &d| n.checked_mul(i64::try_from(d).ok()?));
        if self.ne.contains(&0) {
            wrong("dimensions of at least 1".into(), shape.clone());
        } else if n_elements.is_none() {
            wrong("fewer than 2^63 elements".into(), shape.clone());
        }
        if !self.offset.is_multiple_of(alignment) {
            wrong(format!("an offset that is a multiple of {alignment}"), self.offset.to_string());
        }
        let (ty, n_elements) = (ty?, n_elements.filter(|&n| n > 0)?);
        let ne: Vec<usize> = self.ne.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<_>>()?;
        if !ne[0].is_multiple_of(ty.row().block_len) {
            wrong(format!("rows of whole {ty} blocks of {} elements", ty.row().block_len), shape);
            return None;
        }
        let n_rows = n_elements as u64 / self.ne[0];
        let n_bytes = ty.row_bytes(ne[0]).and_then(|n| n_rows.checked_mul(n as u64));
        let end = n_bytes.and_then(|n| n.checked_add(self.offset)?.checked_add(data_start));
        let start = data_start.checked_add(self.offset);
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => Some(Placed {
                tensor: tandem_spec::Tensor { name: name.into(), ty, ne },
                bytes: usize::try_from(start).ok()?..usize::try_from(end).ok()?,
            }),
            _ => {
                let end = end.map_or("beyond 2^64".into(), |e| e.to_string());
                wrong(
                    format!("bytes within the file of {file_len}"),
                    format!("bytes up to {end} ({shape}, {ty}, offset {} after byte {data_start})", self.offset),
                );
                None
            }
        }
    }
}
