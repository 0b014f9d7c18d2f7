//! Requests to the agent that wait for their answers, and what follows when all of a step have come.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use cube_guest::Answer;

use super::api::server::ConnectionId;
use super::interfaces::NetStep;

/// What follows.
#[derive(Debug)]
pub(crate) enum Then {
    /// Tell the client.
    Respond(ConnectionId),
    /// Tell the client what was measured.
    Stats(ConnectionId),
    /// The same as Prometheus text.
    Metrics(ConnectionId),
    /// The disks of a container are there, or not.
    Created(ConnectionId, String),
    /// A container was asked to start.
    Started(ConnectionId, String),
    /// The guest has forgotten a container that is to start again.
    Forgotten(ConnectionId, String),
    /// A container is frozen (`true`) or not.
    Frozen(ConnectionId, String, bool),
    /// The guest has forgotten a container: its disks go next.
    Removed(ConnectionId, String),
    /// Its disks are not in use any more. With a sentence: why the container could not be created.
    Unbound(ConnectionId, String, Option<String>),
    /// An exec was asked for.
    ExecStarted(ConnectionId, String),
    /// A port was connected to, with this token.
    Forwarded(ConnectionId, u64),
    /// The guest has done something about an interface, or not.
    Interface(NetStep),
    /// A file was opened, and comes through the stream with this token.
    File(ConnectionId, u64),
    /// The set of files that came through this stream is in its volume.
    Written(ConnectionId, u64),
    /// The disk of a volume is there, or the volume is mounted; or not.
    VolumeStep(ConnectionId, String),
    /// A volume is unmounted: its disk goes next.
    VolumeUnmounted(ConnectionId, String),
    /// The disk of a volume is not in use any more. With a sentence: why the volume could not be made.
    VolumeUnbound(ConnectionId, String, Option<String>),
}

#[derive(Debug)]
struct Step {
    left: usize,
    result: Result<Answer, String>,
    then: Then,
}

/// The steps under way.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    steps: BTreeMap<u64, Step>,
    /// The step of each request.
    requests: BTreeMap<u64, u64>,
    last: u64,
}

impl Pending {
    /// A step of `requests`, at least one.
    pub(crate) fn add(&mut self, requests: &[u64], then: Then) {
        self.last += 1;
        let step = Step {
            left: requests.len(),
            result: Ok(Answer::Done),
            then,
        };
        self.steps.insert(self.last, step);
        for request in requests {
            self.requests.insert(*request, self.last);
        }
    }

    /// Takes an answer. With the last one of a step: what follows, with the first error or the last answer.
    pub(crate) fn replied(
        &mut self,
        request: u64,
        result: Result<Answer, String>,
    ) -> Option<(Then, Result<Answer, String>)> {
        let number = self.requests.remove(&request)?;
        let step = self.steps.get_mut(&number)?;
        if step.result.is_ok() {
            step.result = result;
        }
        step.left -= 1;
        if step.left > 0 {
            return None;
        }
        let step = self.steps.remove(&number)?;
        Some((step.then, step.result))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_ends_with_its_last_answer_and_keeps_the_first_error() {
        let mut pending = Pending::default();
        pending.add(&[4, 5, 6], Then::Respond(1));
        assert!(pending.replied(9, Ok(Answer::Done)).is_none());
        assert!(pending.replied(5, Err("first".into())).is_none());
        assert!(pending.replied(4, Err("second".into())).is_none());
        let (_, result) = pending.replied(6, Ok(Answer::Done)).unwrap();
        assert_eq!(result, Err("first".to_owned()));
        assert!(pending.steps.is_empty() && pending.requests.is_empty());
    }
}
