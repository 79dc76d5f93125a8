//! Where a policy's text comes from.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use crate::limits;

/// A place in the text: bytes of one of its files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Span {
    pub(crate) file: u32,
    pub(crate) start: u32,
    pub(crate) end: u32,
}

impl Span {
    /// From where this begins to where `other` ends.
    pub(crate) fn to(self, other: Self) -> Self {
        Self { file: self.file, start: self.start, end: other.end.max(self.end) }
    }
}

#[derive(Clone, Debug)]
struct SourceFile {
    name: String,
    text: String,
    /// Where each line begins.
    lines: Vec<u32>,
}

/// The files that a policy was read from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    files: Vec<SourceFile>,
}

impl Sources {
    /// At most [`limits::POLICY_BYTES`] of text, which the caller has seen to.
    pub(crate) fn add(&mut self, name: &str, text: String) -> u32 {
        let ends = text.bytes().zip(1..).filter(|(byte, _)| *byte == b'\n').map(|(_, next)| next);
        let lines = std::iter::once(0).chain(ends).collect();
        self.files.push(SourceFile { name: name.to_owned(), text, lines });
        self.files.len() as u32 - 1
    }

    fn file(&self, span: Span) -> Option<&SourceFile> {
        self.files.get(span.file as usize)
    }

    pub(crate) fn contents(&self, file: u32) -> &str {
        self.files.get(file as usize).map_or("", |file| &file.text)
    }

    /// The file's name.
    pub fn name(&self, span: Span) -> &str {
        self.file(span).map_or("", |file| &file.name)
    }

    /// Line and column, from 1; a column is a character.
    pub fn place(&self, span: Span) -> (usize, usize) {
        let Some(file) = self.file(span) else { return (1, 1) };
        let line = file.lines.partition_point(|start| *start <= span.start).max(1);
        let begin = file.lines.get(line - 1).copied().unwrap_or(0) as usize;
        let column = file.text.get(begin..span.start as usize).map_or(0, |before| before.chars().count());
        (line, column + 1)
    }

    /// What stands there.
    pub fn text(&self, span: Span) -> &str {
        self.file(span).and_then(|file| file.text.get(span.start as usize..span.end as usize)).unwrap_or("")
    }

    /// The same, its words with one space between.
    pub(crate) fn one_line(&self, span: Span) -> String {
        self.text(span).split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// The line in which it begins, and its file from there on, for pictures of it.
    pub fn line(&self, span: Span) -> &str {
        let Some(file) = self.file(span) else { return "" };
        let (line, _) = self.place(span);
        let begin = file.lines.get(line - 1).copied().unwrap_or(0) as usize;
        file.text.get(begin..).and_then(|rest| rest.lines().next()).unwrap_or("")
    }
}

/// Reads what a policy includes.
pub trait Loader {
    /// The text of what `from` calls `path`, and a name for it that is the same however it is called, by which a file that
    /// includes itself is found.
    ///
    /// # Errors
    /// Whatever keeps it from being read.
    fn load(&self, from: &str, path: &str) -> io::Result<(String, String)>;
}

/// Reads nothing: a policy that includes something is refused.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoIncludes;

impl Loader for NoIncludes {
    fn load(&self, _: &str, _: &str) -> io::Result<(String, String)> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this policy was not read from a file"))
    }
}

/// Texts by their names.
#[derive(Clone, Debug, Default)]
pub struct MemoryLoader(pub BTreeMap<String, String>);

impl Loader for MemoryLoader {
    fn load(&self, _: &str, path: &str) -> io::Result<(String, String)> {
        let text = self.0.get(path).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok((path.to_owned(), text.clone()))
    }
}

/// Files of one folder and those below it.
#[derive(Clone, Debug)]
pub struct FileLoader {
    root: PathBuf,
}

impl FileLoader {
    /// Of the folder `root`.
    ///
    /// # Errors
    /// If there is none.
    pub fn new(root: &Path) -> io::Result<Self> {
        Ok(Self { root: root.canonicalize()? })
    }
}

impl Loader for FileLoader {
    fn load(&self, from: &str, path: &str) -> io::Result<(String, String)> {
        let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why.to_owned()));
        if !Path::new(path).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        {
            return refuse("a policy includes files of its own folder and of those below it");
        }
        let folder = Path::new(from).parent().unwrap_or(Path::new(""));
        let found = self.root.join(folder).join(path).canonicalize()?;
        // A symbolic link may lead out.
        let Ok(name) = found.strip_prefix(&self.root) else {
            return refuse("it lies outside of the policy's folder");
        };
        Ok((name.to_string_lossy().into_owned(), read_bounded(&found)?))
    }
}

/// The text of a file, if it is a regular one and not too long.
pub(crate) fn read_bounded(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    let mut text = String::new();
    let most = limits::POLICY_BYTES as u64;
    // One more, so that the parser sees that it is too long.
    file.take(most + 1).read_to_string(&mut text)?;
    Ok(text)
}
