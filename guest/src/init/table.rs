//! A table whose places are used again, so that it is as long as the most it ever held at once, and what
//! is in it can be called by a small number.
#![forbid(unsafe_code)]

/// The table.
#[derive(Debug)]
pub(crate) struct Table<T>(Vec<Option<T>>);

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Table<T> {
    /// The number that the next [`Table::insert`] gives.
    pub(crate) fn vacant(&self) -> u32 {
        let free = self.0.iter().position(Option::is_none);
        free.unwrap_or(self.0.len()) as u32
    }

    pub(crate) fn insert(&mut self, entry: T) -> u32 {
        let index = self.vacant();
        match self.0.get_mut(index as usize) {
            Some(place) => *place = Some(entry),
            None => self.0.push(Some(entry)),
        }
        index
    }

    pub(crate) fn get(&self, index: u32) -> Option<&T> {
        self.0.get(index as usize)?.as_ref()
    }

    pub(crate) fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.0.get_mut(index as usize)?.as_mut()
    }

    pub(crate) fn take(&mut self, index: u32) -> Option<T> {
        let taken = self.0.get_mut(index as usize)?.take();
        while let Some(None) = self.0.last() {
            self.0.pop();
        }
        taken
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        let numbered = (0..).zip(&self.0);
        numbered.filter_map(|(index, place)| Some((index, place.as_ref()?)))
    }

    /// The first entry that `is`.
    pub(crate) fn find(&self, is: impl Fn(&T) -> bool) -> Option<u32> {
        self.iter()
            .find(|(_, entry)| is(entry))
            .map(|(index, _)| index)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_used_again_and_the_table_does_not_grow() {
        let mut table = Table::default();
        for round in 0..1000 {
            let (a, b) = (table.insert(round), table.insert(-round));
            assert_eq!((a, b), (0, 1));
            assert_eq!(table.take(a), Some(round));
            assert_eq!(table.vacant(), 0);
            assert_eq!(table.iter().collect::<Vec<_>>(), [(1, &-round)]);
            assert_eq!(table.find(|entry| *entry == -round), Some(b));
            assert_eq!(table.take(b), Some(-round));
            assert!(table.is_empty() && table.take(b).is_none());
        }
        assert!(table.0.capacity() <= 4);
    }
}
