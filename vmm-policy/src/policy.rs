//! A policy that holds together.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::compile::{ClassKey, Model, Table, check, resolve};
use crate::limits;
use crate::model::RuleId;
use crate::syntax::{Document, FileLoader, Loader, NoIncludes, PolicyError, Report, Sources, parse_all};

/// A policy that has been read, compiled and checked: nothing that it says is `never` to be can be. It does not change; its clones
/// are the same one.
///
/// ```
/// use vmm_policy::Policy;
///
/// let policy = Policy::parse(
///     "labels web, db\n\
///      vm shop { labels web }\n\
///      vm orders { labels db }\n\
///      allow web to connect vsock 5432 of db",
/// )?;
/// assert!(policy.prove_no_path("orders", "nobody").is_err(), "who is that?");
/// assert!(policy.prove_no_path("shop", "orders")?.is_some(), "that is what the rule is for");
/// # Ok::<(), vmm_policy::PolicyError>(())
/// ```
#[derive(Clone)]
pub struct Policy {
    pub(crate) model: Arc<Model>,
    /// For whom the policy declares.
    pub(crate) table: Arc<Table>,
}

impl Policy {
    /// Of a text that includes nothing.
    ///
    /// # Errors
    /// With all that is wrong with it.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        Self::parse_with("policy", text, &NoIncludes)
    }

    /// Of a text by the name of `name`, and what it includes by way of `loader`.
    ///
    /// # Errors
    /// With all that is wrong with it.
    pub fn parse_with(name: &str, text: &str, loader: &dyn Loader) -> Result<Self, PolicyError> {
        let (document, statements, sources, mut report) = parse_all(name, text.to_owned(), loader);
        // What it says is looked at once it can be read.
        if !report.is_empty() {
            report.finish(&sources)?;
            report = Report::default();
        }
        let model = resolve(document, &statements, sources, &mut report);
        drop(statements);
        if !report.is_empty() {
            report.finish(&model.sources)?;
            report = Report::default();
        }
        let table = Table::new(&model, &[])?;
        check(&model, &table, 0, &mut report)?;
        report.finish(&model.sources)?;
        Ok(Self { model: Arc::new(model), table: Arc::new(table) })
    }

    /// Of a file; it includes files of its folder and of those below it.
    ///
    /// # Errors
    /// If it cannot be read, or with all that is wrong with it.
    pub fn from_file(path: &Path) -> Result<Self, PolicyError> {
        let unread = |source| PolicyError::Read { path: path.to_owned(), source };
        let text = crate::syntax::read_bounded(path).map_err(unread)?;
        let folder = match path.parent() {
            Some(folder) if folder != Path::new("") => folder,
            _ => Path::new("."),
        };
        let loader = FileLoader::new(folder).map_err(unread)?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        Self::parse_with(&name, &text, &loader)
    }

    /// Of a document that a program has made.
    ///
    /// # Errors
    /// With all that is wrong with it, at the places that it has as text; if some of it would be read as something else.
    pub fn from_document(document: &Document) -> Result<Self, PolicyError> {
        let policy = Self::parse(&document.to_string())?;
        let (given, read) = (&document.statements, &policy.document().statements);
        for (at, statement) in given.iter().enumerate().take(read.len()) {
            let text = statement.item.to_string();
            if read.get(at).is_none_or(|read| read.item.to_string() != text) {
                return Err(PolicyError::Unlike { statement: at + 1, text });
            }
        }
        if given.len() != read.len() {
            let statement = given.len().min(read.len()) + 1;
            let longer = if given.len() > read.len() { given } else { read };
            let text = longer.get(statement - 1).map(|one| one.item.to_string());
            return Err(PolicyError::Unlike { statement, text: text.unwrap_or_default() });
        }
        Ok(policy)
    }

    /// The empty policy, which allows nothing.
    pub fn deny_all() -> Self {
        match Self::parse("") {
            Ok(policy) => policy,
            // An empty text has nothing in it that could be wrong.
            Err(error) => unreachable!("{error}"),
        }
    }

    /// With classes beside those that it declares, checked as the policy was.
    pub(crate) fn table_for(&self, more: &[ClassKey]) -> Result<Arc<Table>, PolicyError> {
        let mut table = Arc::clone(&self.table);
        for key in more {
            table = self.extended(&table, key)?;
        }
        Ok(table)
    }

    /// `table` with one class more, if it does not have it.
    pub(crate) fn extended(&self, table: &Arc<Table>, key: &ClassKey) -> Result<Arc<Table>, PolicyError> {
        let Some(wider) = table.with_class(&self.model, key)? else { return Ok(Arc::clone(table)) };
        let mut report = Report::default();
        check(&self.model, &wider, table.class_count(), &mut report)?;
        report.finish(&self.model.sources)?;
        Ok(Arc::new(wider))
    }

    /// What it is called.
    pub fn title(&self) -> &str {
        &self.model.title
    }

    /// As it was read; the included files are not part of it.
    pub fn document(&self) -> &Document {
        &self.model.document
    }

    /// The SHA-256 of what all of its statements say, the same for policies that say the same in other spacing, with other comments or
    /// in other files.
    pub fn digest(&self) -> [u8; 32] {
        self.model.digest
    }

    /// Its files.
    pub fn sources(&self) -> &Sources {
        &self.model.sources
    }

    /// Where and how a rule or a limit of it stands.
    pub fn rule(&self, id: RuleId) -> Option<RuleText<'_>> {
        let span = self.model.span_of(id)?;
        let sources = &self.model.sources;
        Some(RuleText { file: sources.name(span), line: sources.place(span).0, text: sources.text(span) })
    }

    /// All rules and limits.
    pub fn rules(&self) -> impl Iterator<Item = RuleId> + use<> {
        let count = self.model.rules.len() + self.model.limits.len();
        (0..count as u32).map(RuleId)
    }

    /// Whom, and to which port there, a `redirect` leads: the name of a machine or a host principal.
    pub fn redirection(&self, id: RuleId) -> Option<(&str, Option<u64>)> {
        let (party, number) = self.model.rule(id)?.redirect?;
        Some((&self.model.parties.get(party as usize)?.name, number))
    }

    /// The names of the machines, host principals and objects that it declares, in its order.
    pub fn parties(&self) -> impl Iterator<Item = &str> {
        self.model.parties.iter().map(|party| &*party.name)
    }

    /// The names of the flags that its conditions ask for.
    pub fn flags(&self) -> impl Iterator<Item = &str> {
        self.model.conditions.flags()
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self::deny_all()
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("title", &self.model.title)
            .field("rules", &self.model.rules.len())
            .field("parties", &self.model.parties.len())
            .finish_non_exhaustive()
    }
}

/// A rule, as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct RuleText<'a> {
    /// The file.
    pub file: &'a str,
    /// The line, from 1.
    pub line: usize,
    /// The text.
    pub text: &'a str,
}

impl fmt::Display for RuleText<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = self.text.split_whitespace();
        write!(f, "{}:{}:", self.file, self.line)?;
        words.try_for_each(|word| write!(f, " {word}"))
    }
}

const _: () = assert!(limits::STATEMENTS < 1 << 29, "a rank has 29 bits for a rule");
