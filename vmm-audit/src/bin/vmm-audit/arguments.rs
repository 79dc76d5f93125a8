//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

#[derive(Parser)]
#[command(version, about = "Looks at the audit logs of virtual machine monitors", max_term_width = 110)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Whether a log is what its writer wrote; exits with 1 and says where if it is not
    Verify(Verify),
    /// Proves that an entry is in a log, or checks such a proof
    Prove(Prove),
    /// Proves that a log continues a checkpoint that was kept
    Consistency(Consistency),
    /// Accounts for all events: written, counted, missing; and for times of silence
    Gaps(Gaps),
    /// The last entries, and with -f those that come
    Tail(Tail),
    /// Entries that pass a filter
    Query(Query),
    /// Entries as JSON, OCSF, tlog-tiles, or to a syslog or journal
    Export(Export),
    /// Writes a page about a log: one HTML file
    Report(Report),
    /// The public key of a key file, for --key
    Key(Key),
}

#[derive(Args)]
pub(crate) struct Trust {
    /// The log's public key, NAME+HASH+BASE64, or a file that has it
    #[arg(long, value_name = "KEY")]
    pub(crate) key: String,
}

#[derive(Args)]
pub(crate) struct Verify {
    /// The log's directory
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) trust: Trust,
    /// A checkpoint that was kept, which the log must continue
    #[arg(long, value_name = "FILE")]
    pub(crate) since: Vec<PathBuf>,
    /// A writer is at work: what is not acknowledged yet is no finding
    #[arg(long)]
    pub(crate) live: bool,
    /// Check the hash chain and its signatures only, not the tree and the tiles: a third of the time
    #[arg(long)]
    pub(crate) chain_only: bool,
    /// Keep the log's last checkpoint here if it is intact, for --since
    #[arg(long, value_name = "FILE")]
    pub(crate) save_checkpoint: Option<PathBuf>,
    /// For programs
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct Prove {
    /// The log's directory
    #[arg(required_unless_present = "check")]
    pub(crate) dir: Option<PathBuf>,
    /// The sequence number of the entry
    #[arg(required_unless_present = "check")]
    pub(crate) entry: Option<u64>,
    #[command(flatten)]
    pub(crate) trust: Trust,
    /// Check the proof in this file instead; the log is not needed
    #[arg(long, value_name = "FILE", conflicts_with_all = ["dir", "entry"])]
    pub(crate) check: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct Consistency {
    /// The log's directory
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) trust: Trust,
    /// The checkpoint that was kept
    #[arg(long, value_name = "FILE")]
    pub(crate) since: PathBuf,
    /// For programs: with the hashes
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct Gaps {
    /// The log's directory
    pub(crate) dir: PathBuf,
    /// For programs
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Format {
    /// A line for people
    Text,
    /// The event as JSON
    Json,
    /// OCSF JSON
    Ocsf,
    /// C2SP tlog-tiles with entry bundles (export only; --out is a directory)
    Tiles,
}

#[derive(Args)]
pub(crate) struct Tail {
    /// The log's directory
    pub(crate) dir: PathBuf,
    /// How many entries
    #[arg(short = 'n', default_value_t = 10)]
    pub(crate) count: u64,
    /// Go on with those that come
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// What a line has
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
    /// The same as --format json
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct Query {
    /// The log's directory
    pub(crate) dir: PathBuf,
    /// Of one of these kinds
    #[arg(long)]
    pub(crate) kind: Vec<vmm_audit::event::Kind>,
    /// With one of these actions
    #[arg(long)]
    pub(crate) action: Vec<vmm_audit::event::Action>,
    /// With one of these verdicts
    #[arg(long)]
    pub(crate) verdict: Vec<vmm_audit::event::Verdict>,
    /// With one of these outcomes
    #[arg(long)]
    pub(crate) outcome: Vec<vmm_audit::event::Outcome>,
    /// About this virtual machine (a UUID)
    #[arg(long)]
    pub(crate) vm: Option<String>,
    /// Of this source
    #[arg(long)]
    pub(crate) source: Option<u32>,
    /// Not before this entry
    #[arg(long)]
    pub(crate) from: Option<u64>,
    /// Not behind this entry
    #[arg(long)]
    pub(crate) to: Option<u64>,
    /// Not before this time (RFC 3339, or an age as 2h)
    #[arg(long)]
    pub(crate) after: Option<String>,
    /// Not after this time
    #[arg(long)]
    pub(crate) before: Option<String>,
    /// With this text
    #[arg(long)]
    pub(crate) text: Option<String>,
    /// At most so many
    #[arg(long)]
    pub(crate) limit: Option<u64>,
    /// What a line has
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub(crate) format: Format,
    /// The same as --format json
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args)]
pub(crate) struct Export {
    /// The log's directory
    pub(crate) dir: PathBuf,
    /// What is written
    #[arg(long, value_enum, default_value_t = Format::Json)]
    pub(crate) format: Format,
    /// To this file, or directory for tiles; else to standard output
    #[arg(long)]
    pub(crate) out: Option<PathBuf>,
    /// To a sink: journald, syslog:PATH (datagrams), syslog-stream:PATH, syslog-tcp:ADDRESS:PORT
    #[arg(long, conflicts_with = "out")]
    pub(crate) to: Option<String>,
    /// Where it is kept how far this has come, to go on from there
    #[arg(long, value_name = "FILE")]
    pub(crate) cursor: Option<PathBuf>,
    /// Go on with entries that come
    #[arg(short, long)]
    pub(crate) follow: bool,
}

#[derive(Args)]
pub(crate) struct Report {
    /// The log's directory
    pub(crate) dir: PathBuf,
    #[command(flatten)]
    pub(crate) trust: Trust,
    /// The page
    #[arg(long, default_value = "audit-report.html")]
    pub(crate) out: PathBuf,
    /// A writer is at work
    #[arg(long)]
    pub(crate) live: bool,
}

#[derive(Args)]
pub(crate) struct Key {
    /// The key file
    pub(crate) file: PathBuf,
}
