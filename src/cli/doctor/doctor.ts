export function doctor(_json: boolean): number { return 1; }
