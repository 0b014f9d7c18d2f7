//! What happened in the pod, numbered, for clients that follow and clients that come late.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::log_file::timestamp;

/// Events kept for clients that come late.
const KEPT: usize = 1024;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodEventRecord {
    /// Counts from 1 without gaps.
    pub sequence: u64,
    /// RFC 3339, UTC.
    pub time: String,
    /// What happened.
    #[serde(rename = "type")]
    pub kind: EventKind,
    /// The container; absent: the pod itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// Exit code, 128 + N for signal N.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
    /// A sentence: how the machine ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// The agent is ready.
    Ready,
    /// A container's process runs.
    Started,
    /// A container that had ended was started again, and its process runs.
    Restarted,
    /// A container's process ended, or could not be started.
    Exited,
    /// The guest's kernel killed a process for want of memory.
    OomKilled,
    /// A container was removed.
    Removed,
    /// The pod was asked to stop.
    Stopping,
    /// The machine has ended: the last event.
    Ended,
}

/// The last events.
#[derive(Debug, Default)]
pub(crate) struct EventLog {
    events: VecDeque<PodEventRecord>,
    last: u64,
}

impl EventLog {
    /// Notes an event of now.
    pub(crate) fn push(&mut self, kind: EventKind, container: Option<&str>, exit_code: Option<u8>) {
        self.add(kind, container, exit_code, None);
    }

    /// Notes how the machine has ended.
    pub(crate) fn end(&mut self, sentence: String) {
        self.add(EventKind::Ended, None, None, Some(sentence));
    }

    fn add(
        &mut self,
        kind: EventKind,
        container: Option<&str>,
        exit_code: Option<u8>,
        message: Option<String>,
    ) {
        self.last += 1;
        if self.events.len() == KEPT {
            self.events.pop_front();
        }
        self.events.push_back(PodEventRecord {
            sequence: self.last,
            time: timestamp(clock_gettime(ClockId::Realtime)),
            kind,
            container: container.map(str::to_owned),
            exit_code,
            message,
        });
    }

    /// The number of the last event.
    pub(crate) fn last(&self) -> u64 {
        self.last
    }

    /// The events after number `since`, a line of JSON each, and the number of the last.
    pub(crate) fn lines_after(&self, since: u64) -> (String, u64) {
        let lines = self.events.iter().filter(|event| event.sequence > since);
        let lines = lines.filter_map(|event| serde_json::to_string(event).ok());
        (lines.map(|line| line + "\n").collect(), self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_client_gets_what_it_missed_and_the_oldest_go() {
        let mut log = EventLog::default();
        for _ in 0..KEPT + 5 {
            log.push(EventKind::Started, Some("c"), None);
        }
        let (all, last) = log.lines_after(0);
        assert_eq!((all.lines().count(), last), (KEPT, KEPT as u64 + 5));
        let (missed, _) = log.lines_after(last - 2);
        let first: PodEventRecord = serde_json::from_str(missed.lines().next().unwrap()).unwrap();
        assert_eq!(first.sequence, last - 1);
        assert_eq!(log.lines_after(last).0, "");
    }
}
