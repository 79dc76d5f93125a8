//! Seconds since 1970 and the eight time registers of an MC146818, in both number formats and both hour formats.

/// How the registers hold numbers: bits 2 and 1 of register B.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Format {
    /// Binary, not BCD.
    pub(super) binary: bool,
    /// Hours are 0 to 23, not 1 to 12 with bit 7 for the afternoon.
    pub(super) hours_24: bool,
}

const AFTERNOON: u8 = 0x80;
const SECONDS_PER_DAY: i64 = 86_400;
/// Last second of the year 9999, after which the century register has no digits.
const LAST_SECOND: i64 = 253_402_300_799;
/// First second of the year 0.
const FIRST_SECOND: i64 = -62_167_219_200;

/// Date and time of the proleptic Gregorian calendar, years 0 to 9999.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DateTime {
    pub(super) year: u16,
    /// 1 to 12.
    pub(super) month: u8,
    /// 1 to 31.
    pub(super) day: u8,
    pub(super) hour: u8,
    pub(super) minute: u8,
    pub(super) second: u8,
    /// 1 is Sunday.
    pub(super) weekday: u8,
}

/// The registers: second, minute, hour, weekday, day, month, year, century.
pub(super) type Registers = [u8; 8];

/// A number that is known to be small.
fn small(value: i64) -> u8 {
    u8::try_from(value).unwrap_or(0)
}

impl DateTime {
    /// `seconds` since 1970, held within the years 0 to 9999.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let seconds = seconds.clamp(FIRST_SECOND, LAST_SECOND);
        let (days, time) = (seconds.div_euclid(SECONDS_PER_DAY), seconds.rem_euclid(SECONDS_PER_DAY));
        // Years that begin in March have the odd day at their end; 400 of them are 146097 days.
        let since_march_0 = days + 719_468;
        let (era, day_of_era) = (since_march_0.div_euclid(146_097), since_march_0.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        Self {
            year: u16::try_from(year).unwrap_or(0),
            month: small(month),
            day: small(day_of_year - (153 * march_month + 2) / 5 + 1),
            hour: small(time / 3600),
            minute: small(time / 60 % 60),
            second: small(time % 60),
            // 1 January 1970 was a Thursday.
            weekday: small((days + 4).rem_euclid(7) + 1),
        }
    }

    /// Seconds since 1970. The weekday is not looked at.
    pub(super) fn seconds(&self) -> i64 {
        let (month, mut year) = (i64::from(self.month), i64::from(self.year));
        let march_month = if month > 2 { month - 3 } else { month + 9 };
        year -= i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let day_of_year = (153 * march_month + 2) / 5 + i64::from(self.day) - 1;
        let days =
            era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468;
        let time = i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        days * SECONDS_PER_DAY + time
    }

    pub(super) fn to_registers(self, format: Format) -> Registers {
        let number = |value: u8| format.number(value);
        let (year, century) = (self.year % 100, self.year / 100);
        [
            number(self.second),
            number(self.minute),
            format.hour(self.hour),
            number(self.weekday),
            number(self.day),
            number(self.month),
            number(u8::try_from(year).unwrap_or(0)),
            number(u8::try_from(century).unwrap_or(0)),
        ]
    }

    /// What the registers mean. A value that is out of its range is taken for the nearest within.
    pub(super) fn from_registers(registers: Registers, format: Format) -> Self {
        let [second, minute, hour, weekday, day, month, year, century] = registers;
        let number = |value: u8, low: u8, high: u8| format.value(value).clamp(low, high);
        let year = u16::from(number(century, 0, 99)) * 100 + u16::from(number(year, 0, 99));
        let month = number(month, 1, 12);
        Self {
            year,
            month,
            day: number(day, 1, days_in(year, month)),
            hour: format.hour_value(hour),
            minute: number(minute, 0, 59),
            second: number(second, 0, 59),
            weekday: number(weekday, 1, 7),
        }
    }
}

fn days_in(year: u16, month: u8) -> u8 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400)) => 29,
        2 => 28,
        _ => 31,
    }
}

impl Format {
    pub(super) fn number(self, value: u8) -> u8 {
        if self.binary { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn value(self, register: u8) -> u8 {
        if self.binary { register } else { (register >> 4).saturating_mul(10).saturating_add(register & 0xf) }
    }

    pub(super) fn hour(self, hour: u8) -> u8 {
        if self.hours_24 {
            return self.number(hour);
        }
        let afternoon = if hour >= 12 { AFTERNOON } else { 0 };
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.number(twelve) | afternoon
    }

    fn hour_value(self, register: u8) -> u8 {
        if self.hours_24 {
            return self.value(register).min(23);
        }
        let afternoon = if register & AFTERNOON != 0 { 12 } else { 0 };
        self.value(register & !AFTERNOON).clamp(1, 12) % 12 + afternoon
    }
}

/// Second, minute and hour at `seconds` since 1970.
pub(super) fn time_of_day(seconds: i128) -> [u8; 3] {
    let time = i64::try_from(seconds.rem_euclid(SECONDS_PER_DAY.into())).unwrap_or(0);
    [small(time % 60), small(time / 60 % 60), small(time / 3600)]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FORMATS: [Format; 4] = [
        Format { binary: false, hours_24: false },
        Format { binary: false, hours_24: true },
        Format { binary: true, hours_24: false },
        Format { binary: true, hours_24: true },
    ];

    #[test]
    fn known_dates() {
        for (seconds, date, weekday) in [
            (0, (1970, 1, 1), 5),
            (951_782_400, (2000, 2, 29), 3),
            (4_107_542_400, (2100, 3, 1), 2),
            (-1, (1969, 12, 31), 4),
            (LAST_SECOND, (9999, 12, 31), 6),
            (i64::MAX, (9999, 12, 31), 6),
            (i64::MIN, (0, 1, 1), 7),
        ] {
            let time = DateTime::from_seconds(seconds);
            assert_eq!((time.year, time.month, time.day), date, "{seconds}");
            assert_eq!(time.weekday, weekday, "{seconds}");
        }
    }

    #[test]
    fn formats() {
        let time = DateTime { hour: 23, ..DateTime::from_seconds(3599) };
        assert_eq!(time.to_registers(FORMATS[0]), [0x59, 0x59, 0x91, 5, 1, 1, 0x70, 0x19]);
        assert_eq!(time.to_registers(FORMATS[3]), [59, 59, 23, 5, 1, 1, 70, 19]);
        assert_eq!(FORMATS[0].hour(0), 0x12);
        assert_eq!(FORMATS[0].hour(12), 0x92);
    }

    #[test]
    fn nonsense_is_taken_for_the_nearest() {
        for format in FORMATS {
            let time = DateTime::from_registers([0xff; 8], format);
            assert!(time.seconds() <= LAST_SECOND);
            assert_eq!((time.year, time.month, time.day), (9999, 12, 31));
            let time = DateTime::from_registers([0; 8], format);
            assert_eq!((time.year, time.month, time.day), (0, 1, 1));
        }
        let february = DateTime::from_registers([0, 0, 0, 1, 0x31, 2, 0x23, 0x20], FORMATS[1]);
        assert_eq!(february.day, 28);
    }

    proptest! {
        #[test]
        fn seconds_and_registers_agree(seconds in FIRST_SECOND..=LAST_SECOND, format in 0..4_usize) {
            let time = DateTime::from_seconds(seconds);
            prop_assert_eq!(time.seconds(), seconds);
            let registers = time.to_registers(FORMATS[format]);
            prop_assert_eq!(DateTime::from_registers(registers, FORMATS[format]), time);
            prop_assert_eq!(time_of_day(seconds.into()), [time.second, time.minute, time.hour]);
        }
    }
}
