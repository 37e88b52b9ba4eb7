//! Chat templates: messages to the text that a model was trained on, by the Jinja template that its file
//! carries. Templates see what the `transformers` library gives them, in Python's spelling. A file without a
//! template gets none: nothing is put in its place. A template that loops, recurses or eats memory ends with
//! an error (see `guard.rs` for how).

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::machinery::{CodeGenerator, Vm, WhitespaceConfig, make_string_output, parse};
use minijinja::value::Kwargs;
use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};
use serde::Serialize;

use super::guard::{self, Budget};
use super::{Error, Tokenizer};
use crate::gguf::{self, Metadata};

/// Key of the template in a file.
const KEY: &str = "tokenizer.chat_template";
/// Longest template. The longest of released models have some 20 KB.
const TEMPLATE_BYTES_MAX: usize = 128 << 10;
/// Stack of the thread that renders: the parser and the engine recurse, at most this deep for a template of
/// [`TEMPLATE_BYTES_MAX`]. It is reserved, not used.
const STACK_BYTES: usize = 128 << 20;
/// Instructions a template may take, and those for each message on top.
const FUEL: u64 = 1_000_000;
const FUEL_PER_MESSAGE: u64 = 5_000;

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// How messages are rendered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RenderOptions {
    /// End with the beginning of the model's turn.
    pub add_generation_prompt: bool,
    /// Whether the model reasons first, for templates that let one choose; `None` leaves it to the template.
    pub thinking: Option<bool>,
}

impl Default for RenderOptions {
    /// Ends with the beginning of the model's turn, and leaves reasoning to the template.
    fn default() -> Self {
        Self { add_generation_prompt: true, thinking: None }
    }
}

/// A chat template that has been checked.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// The template of a file, or `None` if it has none.
    ///
    /// # Errors
    /// A template that is not text, is too long, or can't be parsed: says where and why.
    pub fn from_metadata(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<Option<Self>, gguf::Error> {
        let name = |id: Option<u32>| {
            id.map_or(String::new(), |id| String::from_utf8_lossy(tokenizer.piece(id, true)).into_owned())
        };
        Self::with_names(metadata, name(tokenizer.bos()), name(tokenizer.eos()))
    }

    /// Checks the template of a file, if it has one, as far as that goes without a tokenizer: it is parsed, and
    /// renders one message of a user.
    ///
    /// # Errors
    /// As [`ChatTemplate::from_metadata`] and [`ChatTemplate::render`], with the file and the key.
    pub fn verify(metadata: &Metadata) -> Result<(), gguf::Error> {
        if let Some(template) = Self::with_names(metadata, "<s>".into(), "</s>".into())? {
            let rendered = template.render(&[Message::new("user", "Hello")], &RenderOptions::default());
            let expected = "a chat template that renders a message";
            rendered.map_err(|error| metadata.error(KEY, expected, error.to_string()))?;
        }
        Ok(())
    }

    fn with_names(metadata: &Metadata, bos: String, eos: String) -> Result<Option<Self>, gguf::Error> {
        let Some(source) = metadata.get::<&str>(KEY)? else { return Ok(None) };
        let template = Self::new(source, bos, eos);
        template.map(Some).map_err(|error| metadata.error(KEY, "a chat template in Jinja", error.to_string()))
    }

    /// A template with the text of the tokens that begin and end a sequence.
    ///
    /// # Errors
    /// [`Error::Template`]: too long, or it can't be parsed.
    pub fn new(source: impl Into<String>, bos_token: String, eos_token: String) -> Result<Self, Error> {
        let template = Self { source: source.into(), bos_token, eos_token };
        if template.source.len() > TEMPLATE_BYTES_MAX {
            let found = template.source.len();
            return Err(Error::Template(format!("it has {found} bytes, and the most is {TEMPLATE_BYTES_MAX}")));
        }
        template.with_stack(|| template.compile().map(|_| ()))?;
        Ok(template)
    }

    /// Whether the template lets one choose if the model reasons first.
    pub fn knows_thinking(&self) -> bool {
        self.source.contains("enable_thinking")
    }

    /// The prompt for `messages`.
    ///
    /// # Errors
    /// [`Error::Template`]: the template refuses the messages, or it fails, or it does more than a chat template
    /// has to; with its line.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, Error> {
        self.with_stack(|| self.run(messages, options))
    }

    /// Runs `work` on a thread with room for the recursion of the template engine. A panic of the engine
    /// becomes an error.
    fn with_stack<T: Send>(&self, work: impl FnOnce() -> Result<T, minijinja::Error> + Send) -> Result<T, Error> {
        let result = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK_BYTES);
            let handle = thread.spawn_scoped(scope, work);
            handle.map(|handle| handle.join())
        });
        match result {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(error))) => Err(Error::Template(message(&error))),
            Ok(Err(_)) => Err(Error::Template("the template engine failed on it".into())),
            Err(error) => Err(Error::Template(format!("no thread to render it: {error}"))),
        }
    }

    fn compile(&self) -> Result<CodeGenerator<'_>, minijinja::Error> {
        // As transformers sets it up.
        let whitespace = WhitespaceConfig { keep_trailing_newline: false, lstrip_blocks: true, trim_blocks: true };
        let tree = guard::rewrite(&parse(&self.source, "chat template", Default::default(), whitespace)?)?;
        let mut code = CodeGenerator::new("chat template", &self.source);
        code.compile_stmt(&tree);
        Ok(code)
    }

    fn run(&self, messages: &[Message], options: &RenderOptions) -> Result<String, minijinja::Error> {
        let mut env = Environment::new();
        // `format` writes widths that stand inside of a text.
        env.remove_filter("format");
        env.remove_filter("pprint");
        env.add_filter("tojson", tojson);
        env.add_function("raise_exception", |why: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, why))
        });
        env.add_function("strftime_now", |format: &str| strftime(format, SystemTime::now()));
        env.set_unknown_method_callback(|state, value, method, args| match method {
            "format" => Err(minijinja::Error::from(ErrorKind::UnknownMethod)),
            _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
        });
        env.set_fuel(Some(FUEL + FUEL_PER_MESSAGE * messages.len() as u64));
        let bytes: usize = messages.iter().map(|message| message.role.len() + message.content.len()).sum();
        Budget::new(bytes, messages.len()).install(&mut env);

        let mut variables = std::collections::BTreeMap::from([
            ("messages", Value::from_serialize(messages)),
            ("add_generation_prompt", Value::from(options.add_generation_prompt)),
            ("bos_token", Value::from(self.bos_token.as_str())),
            ("eos_token", Value::from(self.eos_token.as_str())),
        ]);
        if let Some(thinking) = options.thinking {
            variables.insert("enable_thinking", Value::from(thinking));
        }
        let (instructions, blocks) = self.compile()?.finish();
        let mut text = String::new();
        let mut output = make_string_output(&mut text);
        Vm::new(&env).eval(
            &instructions,
            context! { ..Value::from(variables) },
            &blocks,
            &mut output,
            AutoEscape::None,
        )?;
        drop(output);
        Ok(text)
    }
}

/// What went wrong, in one line with the line of the template, of bounded length.
fn message(error: &minijinja::Error) -> String {
    let mut text: String = match error.kind() {
        ErrorKind::OutOfFuel => "it takes too many steps".to_owned(),
        _ => error.detail().map_or_else(|| error.kind().to_string(), str::to_owned),
    };
    if let Some((end, _)) = text.char_indices().nth(500) {
        text.truncate(end);
    }
    match error.line() {
        Some(line) => format!("line {line}: {text}"),
        None => text,
    }
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it, with its `indent` and `sort_keys`.
fn tojson(value: Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: (Option<bool>, Option<bool>, Option<Value>) =
        (options.get("ensure_ascii")?, options.get("sort_keys")?, options.get("separators")?);
    options.assert_all_used()?;
    let mut json = Vec::new();
    let written = match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent);
            let format = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, format))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, PythonFormatter)),
    };
    written.map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    Ok(Value::from_safe_string(String::from_utf8(json).expect("JSON is UTF-8")))
}

/// A space after commas and colons.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// `now` in UTC, by those letters of C's `strftime` that chat templates use.
fn strftime(format: &str, now: SystemTime) -> Result<String, minijinja::Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        match letters.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", time / 3600),
            Some('M') => out += &format!("{:02}", time / 60 % 60),
            Some('S') => out += &format!("{:02}", time % 60),
            Some('%') => out.push('%'),
            other => {
                let why = format!("strftime_now can't write %{}", other.map_or(String::new(), String::from));
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, why));
            }
        }
    }
    Ok(out)
}

/// Year, month and day, both from 1, of a day counted from 1970-01-01 (Gregorian calendar).
fn civil(days: u64) -> (u64, usize, u64) {
    // Years begin in March here, so that the leap day is the last of the year.
    let days = days + 719_468; // since 0000-03-01
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 } as usize;
    (400 * era + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let date =
            |seconds: u64| strftime("%a %d %b %Y, %A %B %m/%y %H:%M:%S %%", UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(date(0).unwrap(), "Thu 01 Jan 1970, Thursday January 01/70 00:00:00 %");
        assert_eq!(date(951_782_399).unwrap(), "Mon 28 Feb 2000, Monday February 02/00 23:59:59 %");
        assert_eq!(date(951_782_400).unwrap(), "Tue 29 Feb 2000, Tuesday February 02/00 00:00:00 %");
        assert_eq!(date(1_798_761_599).unwrap(), "Thu 31 Dec 2026, Thursday December 12/26 23:59:59 %");
        assert!(strftime("%Q", UNIX_EPOCH).is_err());
    }
}
