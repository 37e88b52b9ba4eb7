//! The chat on a terminal: line editing and history, the turns kept as messages, and what Ctrl-C does between
//! answers. How an answer is computed and shown is the caller's: it is handed in as a function.

use crate::text::Message;
use anyhow::Context;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

/// Computes and shows the answer to messages. Returns all that was said, also when Ctrl-C ended it.
type Answer<'a> = dyn FnMut(&[Message]) -> anyhow::Result<String> + 'a;

/// One turn: asks for an answer to `text` and keeps both. When that fails, the question is taken back.
fn turn(messages: &mut Vec<Message>, text: &str, answer: &mut Answer<'_>) -> anyhow::Result<()> {
    messages.push(Message::new("user", text));
    match answer(messages) {
        Ok(said) => messages.push(Message::new("assistant", said)),
        Err(error) => {
            messages.pop();
            return Err(error);
        }
    }
    Ok(())
}

/// The line editor. It takes over the signal of Ctrl-C, so a handler for answers has to be set after it.
///
/// # Errors
/// No terminal that can be used.
pub(super) fn editor() -> anyhow::Result<DefaultEditor> {
    DefaultEditor::new().context("cannot use the terminal for a chat")
}

/// Continues `messages` with lines from the terminal until Ctrl-D, or a second Ctrl-C; `interrupted` says whether
/// Ctrl-C ended the last answer. The prompt goes to the terminal; lines are remembered for this chat only.
///
/// # Errors
/// The terminal cannot be read, or standard output is closed. Another answer that fails is reported, and the chat
/// goes on.
pub(super) fn chat(
    mut editor: DefaultEditor,
    mut messages: Vec<Message>,
    interrupted: &dyn Fn() -> bool,
    answer: &mut Answer<'_>,
) -> anyhow::Result<()> {
    eprintln!("Type a message. Ctrl-C ends an answer, Ctrl-D the chat.");
    let mut once = false; // Ctrl-C was pressed, and nothing was said since
    loop {
        match editor.readline("> ") {
            Ok(line) if line.trim().is_empty() => once = false,
            Ok(line) => {
                editor.add_history_entry(line.as_str()).context("cannot remember the line")?;
                if let Err(error) = turn(&mut messages, &line, answer) {
                    if error.downcast_ref::<std::io::Error>().is_some() {
                        return Err(error);
                    }
                    eprintln!("error: {error:#}");
                }
                once = interrupted();
            }
            Err(ReadlineError::Interrupted) if !once => {
                eprintln!("Ctrl-C again quits.");
                once = true;
            }
            Err(ReadlineError::Interrupted | ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(error).context("cannot read the terminal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_kept_and_a_failed_one_is_taken_back() {
        let mut messages = vec![Message::new("system", "s")];
        let mut seen = Vec::new();
        let mut answer = |messages: &[Message]| {
            seen.push(messages.len());
            let last = &messages.last().expect("the question").content;
            anyhow::ensure!(last != "too long", "does not fit");
            Ok(format!("<think>hm</think>yes {last}"))
        };
        turn(&mut messages, "one", &mut answer).unwrap();
        let error = turn(&mut messages, "too long", &mut answer).unwrap_err();
        assert_eq!(error.to_string(), "does not fit");
        turn(&mut messages, "two", &mut answer).unwrap();
        assert_eq!(seen, [2, 4, 4]);
        let said: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
        assert_eq!(said, ["s", "one", "<think>hm</think>yes one", "two", "<think>hm</think>yes two"]);
    }
}
