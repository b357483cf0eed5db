/**
 * Token buckets, as `bw_size=,bw_one_time_burst=,bw_refill_time=` and `ops_...=` describe them: a bucket of that many
 * tokens (bytes or operations) that fills evenly in the refill time, and a burst that is there once.
 */

/** Refill time in milliseconds. */
export interface BucketOptions {
  readonly size: number;
  readonly oneTimeBurst?: number;
  readonly refillTime: number;
}

export interface LimiterOptions {
  readonly bandwidth?: BucketOptions;
  readonly operations?: BucketOptions;
}

/** Whom a device asks before it does something. */
export interface Limiter {
  /** Takes one operation of that many bytes, or, when it must wait, nothing. @returns whether it may go now */
  take(bytes: number): boolean;
  /** Milliseconds until an operation of that many bytes may go. */
  delay(bytes: number): number;
  /** The device waits for nothing any more. Where others share the limit it is their turn. */
  rest?(): void;
  close?(): void;
}

/** Doubles that hold what a bucket lacks. */
export const BUCKET_NUMBERS = 3;
/** Tokens that are missing; those of the burst that are gone; when it was last filled, in milliseconds. A full bucket is all zeros. */
const At = { missing: 0, burst: 1, filled: 2 } as const;

export class TokenBucket {
  /** Tokens a millisecond. */
  readonly rate: number;

  /** @param numbers BUCKET_NUMBERS doubles */
  constructor(
    private readonly options: BucketOptions,
    private readonly numbers: Float64Array,
  ) {
    this.rate = options.size / options.refillTime;
  }

  /** @param now milliseconds of a clock that never goes back */
  refill(now: number): void {
    const { numbers } = this;
    numbers[At.missing] = Math.max(numbers[At.missing] - (now - numbers[At.filled]) * this.rate, 0);
    numbers[At.filled] = now;
  }

  get #tokens(): number {
    const { options, numbers } = this;
    return (options.oneTimeBurst ?? 0) - numbers[At.burst] + options.size - numbers[At.missing];
  }

  /** A request larger than the bucket waits for a full one, and leaves it in debt: it must go some day. */
  has(count: number): boolean {
    return this.#tokens >= Math.min(count, this.options.size);
  }

  take(count: number): void {
    const { options, numbers } = this;
    const fromBurst = Math.min((options.oneTimeBurst ?? 0) - numbers[At.burst], count);
    numbers[At.burst] += fromBurst;
    numbers[At.missing] += count - fromBurst;
  }

  /** Milliseconds until `has`, when others take so many tokens first. */
  delay(count: number, others = 0): number {
    const lacking = others + Math.min(count, this.options.size) - this.#tokens;
    return lacking <= 0 ? 0 : Math.ceil(lacking / this.rate);
  }
}

export class RateLimiter implements Limiter {
  readonly #bandwidth?: TokenBucket;
  readonly #operations?: TokenBucket;

  /** @param now milliseconds of a clock that never goes back */
  constructor(
    { bandwidth, operations }: LimiterOptions,
    private readonly now: () => number,
  ) {
    const bucket = (options: BucketOptions) => new TokenBucket(options, new Float64Array(BUCKET_NUMBERS));
    if (bandwidth !== undefined) this.#bandwidth = bucket(bandwidth);
    if (operations !== undefined) this.#operations = bucket(operations);
    this.#refill();
  }

  take(bytes: number): boolean {
    this.#refill();
    if (this.#bandwidth?.has(bytes) === false || this.#operations?.has(1) === false) return false;
    this.charge(bytes);
    return true;
  }

  /** Takes an operation of that many bytes which has happened already; what is missing is owed. */
  charge(bytes: number): void {
    this.#bandwidth?.take(bytes);
    this.#operations?.take(1);
  }

  #refill(): void {
    const now = this.now();
    this.#bandwidth?.refill(now);
    this.#operations?.refill(now);
  }

  delay(bytes: number): number {
    this.#refill();
    return Math.max(this.#bandwidth?.delay(bytes) ?? 0, this.#operations?.delay(1) ?? 0);
  }
}
